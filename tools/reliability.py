"results/reliability.csv: the situations of the tests that train for real, and whether pruning held them, ours and the peer's."
import subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
from onecycle_prune._utils import atomic_write

shared, ours_alone = ['tests/test_reliability.py'], ['tests/test_models.py', 'tests/test_many_processes.py']


def outcomes(*args):
    "Run pytest, and return a row for each test: area, situation, whether it held"
    with tempfile.TemporaryDirectory() as d:
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '-W', 'ignore', f'--junitxml={d}/out.xml', *args])
        cases = ElementTree.parse(f'{d}/out.xml').iter('testcase')
    rows = [({p.get('name'): p.get('value') for p in c.iter('property')}, {o.tag for o in c}) for c in cases]
    return pd.DataFrame([(p['area'], p['situation'], not tags & {'failure', 'error'}) for p, tags in rows if 'skipped' not in tags], columns=['area', 'situation', 'held'])


def verdicts(df):
    "One word for each situation, which may be several tests"
    word = lambda held: 'held' if held.all() else 'not held' if not held.any() else f'{held.sum()} of {len(held)}'
    return df.groupby(['area', 'situation'], sort=False).held.agg(word)


if __name__ == '__main__':
    ours, peer = outcomes(*shared, *ours_alone), outcomes('--peer', *shared)
    df = pd.DataFrame({'onecycle_prune': verdicts(ours), f"fasterai {version('fasterai')}": verdicts(peer)}).fillna('not tried')
    df = df.reindex(verdicts(ours).index).reset_index()
    atomic_write(Path('results/reliability.csv'), lambda p: df.to_csv(p, index=False))
    print(df.to_string(index=False))
