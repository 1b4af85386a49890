"""Every notebook runs from its first cell to its last, as nbdev_test runs it.

Each has a process of its own, so that no model outlives its lesson; they are forked from one that has imported the library already.
"""
import multiprocessing, os, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
START = multiprocessing.get_context('forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn')
if START.get_start_method() == 'forkserver': START.set_forkserver_preload(['yothalia.benchmark', 'yothalia.export', 'yothalia.serve', 'yothalia.commands', 'nbdev.test'])

ROOMS = sorted(p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb')
               if not any(o.startswith(('.', '_')) for o in p.relative_to(ROOT/'nbs').parts))


def executed(nb, log):
    "In a process of its own: run a notebook, all that it says goes into a file."
    with open(log, 'w') as f: os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
    from nbdev.config import get_config
    from nbdev.test import test_nb
    path = ROOT/'nbs'/f'{nb}.ipynb'
    os.chdir(path.parent)
    sys.exit(not test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)[0])


@pytest.mark.parametrize('nb', ROOMS)
def test_notebook(nb, tmp_path):
    p = START.Process(target=executed, args=(nb, str(tmp_path/'said'))); p.start(); p.join(1200)
    if late := p.is_alive(): p.kill(); p.join()
    assert p.exitcode == 0, ('it did not end within 20 minutes\n' if late else '') + (tmp_path/'said').read_text()[-6000:]
