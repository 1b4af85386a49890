"On a slow machine the tests end in time: those whose turn comes after YOTHALIA_TEST_UNTIL are left out, and say so."
import os, time
import pytest

UNTIL = float(os.environ.get('YOTHALIA_TEST_UNTIL') or 'inf')  # seconds since 1970


def pytest_runtest_setup(item):
    walk = 250*('test_walk' in item.nodeid)  # these take minutes
    if time.time() > UNTIL - walk: pytest.skip('left out: no time left on this machine (YOTHALIA_TEST_UNTIL)')


def pytest_terminal_summary(terminalreporter):
    late = [r for r in terminalreporter.stats.get('skipped', []) if 'YOTHALIA_TEST_UNTIL' in str(r.longrepr)]
    if late: terminalreporter.line(f'{len(late)} tests left out, for this machine is slow: ' + ', '.join(r.nodeid.split('/')[-1] for r in late))
