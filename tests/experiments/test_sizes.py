"Large and sparse against small and dense: as many weights, the same seeds, each training once"
from dataclasses import replace

import pytest
from onecycle_prune.experiments import sizes
from onecycle_prune.experiments.networks import resnet18_cifar
from onecycle_prune.experiments.records import read_records
from onecycle_prune.experiments.sizes import (SizeRun, compare_sizes, dense_width, n_weights, sizes_differences,
    sizes_table, train_size)

from reference import layers_of

run = SizeRun(8, .75, 'large, sparse', 'digits', 128, 1, 0, 64, 1e-2)


@pytest.mark.parametrize('width', [1, 5, 32])
@pytest.mark.parametrize('classes', [10, 101])
def test_weights(width, classes):
    "Those of convolutions and of the linear layer, without norms and biases"
    net = resnet18_cifar(classes, width)
    assert n_weights(width, classes) == sum(p.numel() for p in net.parameters() if p.ndim > 1)


@pytest.mark.parametrize('sparsity', [.01, .3, .75, .9, .98, .9999])
def test_width(sparsity):
    "No other width comes closer"
    wanted, found = (1-sparsity)*n_weights(32), dense_width(32, sparsity)
    counts = {w: sum(m.weight.numel() for m in layers_of(resnet18_cifar(10, w)).values()) for w in range(1, 33)}
    assert abs(counts[found] - wanted) == min(abs(c - wanted) for c in counts.values())


@pytest.mark.parametrize('form', ['large, sparse', 'small, dense'])
def test_train(form, monkeypatch):
    "The record counts the weights of the trained network that are not zero"
    models, report = [], sizes.sparsity_report
    monkeypatch.setattr(sizes, 'sparsity_report', lambda m: models.append(m) or report(m))
    result = train_size(replace(run, form=form))
    layers = layers_of(models[0])
    assert result['nonzeros'] == sum(int(m.weight.count_nonzero()) for m in layers.values())
    assert layers['0.0'].out_channels == result['width'] == (8 if run.form == form else dense_width(8, .75))
    assert {'accuracy', 'running', 'seconds'} <= result.keys()
    assert result['nonzeros'] == n_weights(dense_width(8, .75))


def record(form, seed, accuracy, **kwargs):
    return dict(data='digits', large=8, sparsity=.75, form=form, seed=seed, accuracy=accuracy, state='done',
        width=8, nonzeros=100, seconds=2.) | kwargs


def test_tables():
    "Means, and differences that are paired by seed"
    of_forms = {'large, sparse': (90, 80, 70), 'small, dense': (88, 79, 67)}
    records = [record(form, seed, a/100) for form, of_form in of_forms.items() for seed, a in enumerate(of_form)]
    table = sizes_table(records).loc['digits', 8, .75]
    assert table.accuracy.to_dict() == pytest.approx({'large, sparse': 80, 'small, dense': 78})
    assert table.seeds.tolist() == [3, 3] and table.nonzeros.tolist() == [100, 100]
    difference = sizes_differences(records).loc['digits', 8, .75]
    assert difference['mean'] == pytest.approx(2) and 0 > difference.low > -1 and difference.n == 3
    with pytest.raises(ValueError, match='No training'): sizes_table([record('small, dense', 0, .5, state='failed')])


def test_command(tmp_path, capsys):
    "Both forms are trained from each seed, and not again"
    def _run(): compare_sizes(8, images=128, sparsities='.5,.9', epochs=1, seeds='0,1', out=tmp_path/'records.jsonl')
    _run()
    records = read_records(tmp_path/'records.jsonl')
    assert len(records) == 8 and {r['state'] for r in records} == {'done'}
    capsys.readouterr()
    _run()
    assert read_records(tmp_path/'records.jsonl') == records
    printed = capsys.readouterr().out
    assert 'small, dense' in printed and 'low' in printed and 'seed 0' not in printed


@pytest.mark.parametrize('kwargs,message', [
    (dict(width=0), 'at least 1, got 0'), (dict(sparsities='90'), 'Did you mean 0.9'), (dict(data='cifar'), 'cifar10')])
def test_errors(kwargs, message, tmp_path):
    with pytest.raises(SystemExit, match=f'ocp-compare-sizes: .*{message}'):
        compare_sizes(**kwargs, out=tmp_path/'records.jsonl')
    assert not list(tmp_path.iterdir())
