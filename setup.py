"""Everything is said once, in settings.ini; this hands it to setuptools, and packs notebooks and recipes."""
import shutil, subprocess
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here, cfg = Path(__file__).parent, ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']


class WithNotebooks(build_py):
    "An installed package runs the same notebooks by the same recipes, so it brings them along, and the commit it was built from."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        to = Path(self.build_lib)/cfg['lib_name']
        for kind, ending in (('nbs', 'ipynb'), ('runs', 'yml')):
            for p in (here/kind).rglob(f'*.{ending}'):
                if any(o.startswith(('.', '_')) for o in p.relative_to(here).parts): continue
                (to/p.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(p, to/p.relative_to(here))
        def git(*a): return subprocess.run(['git', *a], cwd=here, capture_output=True, text=True).stdout.strip()
        try: built = git('rev-parse', 'HEAD') + '-dirty'*bool(git('status', '--porcelain'))
        except OSError: built = ''
        (to/'commit.txt').write_text(built)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['yothalia', 'yothalia.*']),
    package_data={'yothalia': ['sample/*.jsonl', 'static/*']}, cmdclass=dict(build_py=WithNotebooks),
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'gpu')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
