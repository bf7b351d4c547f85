"The names that `from onecycle_prune.all import *` brings."
import ast, builtins, types
from pathlib import Path

import pytest

import onecycle_prune.all

names = set(onecycle_prune.all.__all__)
shared_with_fastai = set()  # names that may hide a name of fastai: none


def star(module):
    "What `from module import *` brings"
    namespace = {}
    exec(f'from {module} import *', namespace)
    return {n: v for n, v in namespace.items() if n != '__builtins__'}


def test_hides_nothing_of_fastai(): assert names & set(star('fastai.vision.all')) == shared_with_fastai


def test_hides_no_builtin(): assert not names & set(dir(builtins))


@pytest.mark.parametrize('name', ['cos', 'lin', 'conv', 'linear', 'random', 'axes', 'match', 'choose'])
def test_left_in_its_module(name): assert name not in star('onecycle_prune.all')


def test_all_that_is_imported_is_exported():
    "`__all__` lists the names that the module imports, each once, and no others"
    tree = ast.parse(Path(onecycle_prune.all.__file__).read_text())
    imported = [a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert sorted(imported) == sorted(onecycle_prune.all.__all__) and len(imported) == len(names)


def test_no_modules(): assert not [n for n, v in star('onecycle_prune.all').items() if isinstance(v, types.ModuleType)]


@pytest.mark.parametrize('name', [
    'SparsifyCallback', 'Sparsifier', 'Schedule', 'SchedOneCycle', 'Criteria', 'large_final', 'one_cycle',
    'sparsity_report', 'plot_layers', 'plot_schedules', 'schedules', 'criteria', 'granularities', 'Structured'])
def test_exports(name): assert name in star('onecycle_prune.all')


def test_after_fastai():
    "A script that imports both has fastai's own names and ours"
    namespace = {}
    exec('from fastai.vision.all import *\nfrom onecycle_prune.all import *', namespace)
    ours, fastais = star('onecycle_prune.all'), star('fastai.vision.all')
    assert all(namespace[n] is v for n, v in ours.items()) and all(namespace[n] is v for n, v in fastais.items())
