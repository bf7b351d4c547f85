"The files that stand in two places agree, and the wheel holds the package alone."
import subprocess, sys
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest

root = Path(__file__).parent.parent
cfg = ConfigParser()
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']


def run(*cmd, cwd):
    res = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr


@pytest.fixture
def copy(tmp_path):
    "A copy of the project to build in, at a path with a space"
    return copytree(root, tmp_path/'a copy', ignore=ignore_patterns('.*', 'build', 'demo', '*.egg-info', '__pycache__'))


def files(folder):
    "The contents of the files that `make prepare` writes"
    paths = [folder/'README.md'] + [p for d in ('nbs', 'onecycle_prune', 'index_files') for p in (folder/d).rglob('*')]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths
            if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)}


def test_prepared(copy):
    "Package and README.md are what the notebooks say, and the notebooks are clean"
    for p in (copy/'onecycle_prune').glob('*.py'):
        # a module without its notebook does not come back; `all` only gathers names, and is written by hand as fastai's is
        if p.name not in ('__init__.py', 'all.py'): p.unlink()
    (copy/'.venv').symlink_to(sys.prefix)
    run('make', 'prepare', '-o', '.venv/ready', cwd=copy)
    old, new = files(root), files(copy)
    stale = [f for f in sorted(old.keys() | new.keys()) if old.get(f) != new.get(f)]
    assert not stale, 'run `make prepare`'


@pytest.fixture
def wheel(copy, tmp_path):
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', str(tmp_path), '.', cwd=copy)
    return ZipFile(next(tmp_path.glob('*.whl')))


def test_wheel(wheel):
    tops = {n.split('/')[0] for n in wheel.namelist()}
    info = next(t for t in tops if t.endswith('.dist-info'))
    assert tops == {'onecycle_prune', info}
    modules = {n.split('/')[1] for n in wheel.namelist() if n.startswith('onecycle_prune/')}
    assert modules == {p.name for p in (root/'onecycle_prune').glob('*.py')}
    metadata = wheel.read(f'{info}/METADATA').decode()
    for line in ('Name: onecycle_prune', f"Summary: {cfg['description']}", f"License-Expression: {cfg['license']}",
                 f"Requires-Python: >={cfg['min_python']}"): assert line in metadata.splitlines()
    for script in cfg['console_scripts'].split(): assert script.replace('=', ' = ') in wheel.read(f'{info}/entry_points.txt').decode()


@pytest.mark.parametrize('key', ['description', 'author', 'license', 'min_python'])
def test_one_place(key):
    "What settings.ini says, neither setup.py nor pyproject.toml says again"
    for f in ('setup.py', 'pyproject.toml'): assert cfg[key] not in (root/f).read_text(encoding='utf-8')
