"The methods of the field at equal budget: each trains, is recorded, and prunes as many weights"
from dataclasses import replace

import pytest
from onecycle_prune.experiments import methods
from onecycle_prune.experiments.common import timed_fit
from onecycle_prune.experiments.methods import (MethodRun, compare_methods, methods_table, n_collapsed, recipes,
    train_method)
from onecycle_prune.experiments.networks import get_arch
from onecycle_prune.experiments.records import read_records

from reference import layers_of

arch = 'resnet18_cifar_quarter'
sizes = {n: m.weight.numel() for n, m in layers_of(get_arch(arch)(num_classes=10)).items()}


def run(method, sparsity=.9): return MethodRun(arch, 'digits', 128, 1, 0, method, sparsity, 64, 1e-2)


@pytest.mark.parametrize('method', recipes)
def test_arguments(method):
    "Each method has a callback of its own"
    cb = replace(run(method), epochs=2).callback()
    assert cb.sparsity == .9 and cb.granularity == 'weight'
    others = [repr(replace(run(o), epochs=2).callback()) for o in recipes if o != method]
    assert repr(cb) not in others or method in ('one_cycle', 'distilled', 'distilled_counted')


@pytest.mark.parametrize('method', ['one_cycle', 'distilled', 'rigl', 'snip_shuffled'])
def test_train(method):
    "The result has exact zeros, and the time of a teacher"
    result = train_method(run(method))
    # a weight that has returned to where its input is always zero stays zero
    reached = sum(result['zeros'].values())
    assert round(.9*sum(sizes.values())) <= reached <= round(.91*sum(sizes.values()))
    assert result['zeros'].keys() == sizes.keys() and 0 <= result['accuracy'] <= 1 and result['seconds'] > 0
    assert (result['teacher_seconds'] > 0) == (method == 'distilled')


@pytest.mark.parametrize('method,epochs', [('distilled', [2, 2]), ('distilled_counted', [1, 1])])
def test_budget_of_teacher(method, epochs, monkeypatch):
    "The teacher is trained apart from the budget, or within it"
    fitted = []
    def fit(learn, n, lr, cbs):
        fitted.append(n)
        return timed_fit(learn, n, lr, cbs)
    monkeypatch.setattr(methods, 'timed_fit', fit)
    assert train_method(replace(run(method), epochs=2))['teacher_seconds'] > 0
    assert fitted == epochs


def test_no_budget():
    with pytest.raises(ValueError, match='at least 2 epochs'): run('distilled_counted').callback()


def test_dense():
    result = train_method(run('dense', 0.))
    assert not any(result['zeros'].values())


def test_collapse():
    "A layer with one weight left has collapsed, also one without any"
    assert n_collapsed(sizes | {'7': sizes['7']-1, '0.0': sizes['0.0']-2}, sizes) == len(sizes)-1
    assert n_collapsed(dict.fromkeys(sizes, 0), sizes) == 0


def test_command(tmp_path, capsys):
    "Trainings are recorded, dense ones once, and not repeated"
    def _run(methods): compare_methods(arch, images=128, methods=methods, sparsities='.5,.9', epochs=1, seeds='0',
        out=tmp_path/'records.jsonl')
    _run('dense,random')
    records = read_records(tmp_path/'records.jsonl')
    assert [(r['method'], r['sparsity'], r['state']) for r in records] == [
        ('dense', 0, 'done'), ('random', .5, 'done'), ('random', .9, 'done')]
    assert [sum(r['zeros'].values()) for r in records] == [round(s*sum(sizes.values())) for s in (0, .5, .9)]
    capsys.readouterr()
    _run('random,dense')
    assert read_records(tmp_path/'records.jsonl') == records
    out = capsys.readouterr().out
    assert 'random' in out and '0.9' in out and 'seed' not in out
    assert list(methods_table(records).index) == ['dense', 'random']


@pytest.mark.parametrize('kwargs,message', [
    (dict(methods='rgl'), "Did you mean 'rigl'"), (dict(sparsities='90'), 'Did you mean 0.9'),
    (dict(data='cifar'), 'cifar10'), (dict(arch='resnet'), 'resnet')])
def test_errors(kwargs, message, tmp_path):
    with pytest.raises(SystemExit, match=f'ocp-compare-methods: .*{message}'):
        compare_methods(**dict(arch=arch) | kwargs, out=tmp_path/'records.jsonl')
    assert not list(tmp_path.iterdir())
