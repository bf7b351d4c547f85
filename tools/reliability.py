"""Write results/reliability.csv: one row for each situation that the tests cover, for this package and for fasterai.

A test class is an area, and the docstring of a test is a situation."""
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pandas as pd
from onecycle_prune._utils import atomic_write

# The first also run with fasterai's callback in place of this package's.
tests_for_both = ['tests/test_reliability.py']
tests_for_ours = ['tests/test_models.py', 'tests/test_distributed.py']


def run_tests(*args: str) -> pd.DataFrame:
    "Run pytest with `args`; a row for each test that was not skipped: area, situation, and whether it passed"
    with TemporaryDirectory() as folder:
        report = f'{folder}/report.xml'
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '-W', 'ignore', f'--junitxml={report}', *args])
        cases = list(ElementTree.parse(report).iter('testcase'))
    rows = []
    for case in cases:
        tags = {child.tag for child in case}
        if 'skipped' in tags: continue
        properties = {p.get('name'): p.get('value') for p in case.iter('property')}
        rows.append((properties['area'], properties['situation'], not tags & {'failure', 'error'}))
    return pd.DataFrame(rows, columns=['area', 'situation', 'passed'])


def verdict(passed: pd.Series) -> str:
    "'held', 'not held', or how many of several tests passed"
    if passed.all(): return 'held'
    return f'{passed.sum()} of {len(passed)}' if passed.any() else 'not held'


def verdicts(tests: pd.DataFrame) -> pd.Series:
    "The verdict of each situation, which may have several tests"
    return tests.groupby(['area', 'situation'], sort=False).passed.agg(verdict)


if __name__ == '__main__':
    ours = verdicts(run_tests(*tests_for_both, *tests_for_ours))
    fasterai = verdicts(run_tests('--fasterai', *tests_for_both))
    table = pd.DataFrame({'onecycle_prune': ours, f"fasterai {version('fasterai')}": fasterai}).fillna('not tried')
    table = table.reindex(ours.index).reset_index()
    atomic_write(Path('results/reliability.csv'), lambda path: table.to_csv(path, index=False))
    print(table.to_string(index=False))
