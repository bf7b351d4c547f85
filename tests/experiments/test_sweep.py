"A sweep over sparsities: it can be interrupted and continued, and its table is right"
import pandas as pd, pytest, torch
from fastai.basics import accuracy
from onecycle_prune.experiments.sweep import plot_sweep, sweep, sweep_network
from torch.utils.flop_counter import FlopCounterMode

from networks import tiny_images, tiny_learner, total_weights
from reference import layers_of


@pytest.fixture
def recipe(tmp_path):
    "A function that makes a learner, one that trains it, and the callbacks it was called with"
    seen, learners = [], []
    def _new_learner():
        learners.append(tiny_learner(tmp_path, metrics=accuracy))
        return learners[-1]
    def _fit(learn, cb):
        seen.append(cb and cb.sparsity)
        learn.fit_one_cycle(1, 1e-2, cbs=cb)
    return _new_learner, _fit, seen, learners


def test_table(recipe, tmp_path):
    "Zeros, metrics and multiply-adds are those of the trained networks"
    new_learner, fit, _, learners = recipe
    table = sweep(new_learner, fit, [.5, .9], tmp_path/'sweep.csv')
    assert table.sparsity.tolist() == [0, .5, .9]
    assert table.zeros.tolist() == pytest.approx([0, *(round(s*total_weights)/total_weights for s in (.5, .9))])
    for (_, row), learn in zip(table.iterrows(), learners, strict=True):
        loss, acc = learn.validate()
        assert (row.valid_loss, row.accuracy) == pytest.approx((loss, acc))
        assert row.nonzero == sum(int(p.count_nonzero()) for p in learn.model.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter: learn.model.eval()(tiny_images(1))
        assert row['multiply-adds'] == counter.get_total_flops()//2
        flops = counter.get_flop_counts()
        left = sum(sum(flops[f'Sequential.{n}'].values())//2*float((m.weight != 0).double().mean())
            for n, m in layers_of(learn.model).items())
        assert row['without zeros'] == pytest.approx(left, abs=len(flops))
        assert row.ms > 0 and row['fast ms'] > 0


def test_continue(recipe, tmp_path):
    "An interrupted sweep goes on with the training that was interrupted"
    new_learner, fit, seen, _ = recipe
    def _stops(learn, cb):
        if cb and cb.sparsity == .9: raise KeyboardInterrupt
        fit(learn, cb)
    with pytest.raises(KeyboardInterrupt): sweep(new_learner, _stops, [.5, .9], tmp_path/'sweep.csv')
    before = pd.read_csv(tmp_path/'sweep.csv')
    assert seen == [None, .5] and len(before) == 2
    table = sweep(new_learner, fit, [.5, .9], tmp_path/'sweep.csv')
    assert seen == [None, .5, .9] and table.sparsity.tolist() == [0, .5, .9]
    pd.testing.assert_frame_equal(table[:2], before)
    again = sweep(new_learner, fit, [.9], tmp_path/'sweep.csv')
    assert len(seen) == 3 and again.sparsity.tolist() == [0, .9]


def test_other_settings(recipe, tmp_path):
    "Sweeps with other settings of the callback share a file and the dense training"
    new_learner, fit, seen, _ = recipe
    sweep(new_learner, fit, [.5], tmp_path/'sweep.csv')
    table = sweep(new_learner, fit, [.5], tmp_path/'sweep.csv', context='local')
    assert seen == [None, .5, .5] and len(table) == 2
    assert "context='local'" in table.callback[1]


@pytest.mark.parametrize('how,message', [
    (dict(context='globel'), "Did you mean 'global'"), (dict(sparsities=[.5, 90]), 'Did you mean 0.9'),
    (dict(criterion='l1'), 'criteria')])
def test_wrong(recipe, tmp_path, how, message):
    "A wrong argument raises before anything is trained or written"
    new_learner, fit, seen, _ = recipe
    with pytest.raises((ValueError, TypeError), match=message):
        sweep(new_learner, fit, **dict(out=tmp_path/'sweep.csv') | how)
    assert not seen and not (tmp_path/'sweep.csv').exists()


def test_plot():
    "The first metric is drawn; the dense network is a line"
    columns = 'sparsity,zeros,valid_loss,accuracy,nonzero,compressed MB,without zeros,ms,fast ms'.split(',')
    table = pd.DataFrame([[i + j/10 for j in range(9)] for i in range(3)], columns=columns)
    for ax, column in zip(plot_sweep(table), ['zeros', 'compressed MB', 'without zeros', 'fast ms'], strict=True):
        pruned, dense = ax.lines
        assert pruned.get_xdata().tolist() == table[column].tolist()[1:]
        assert pruned.get_ydata().tolist() == table.accuracy.tolist()[1:]
        assert set(dense.get_ydata()) == {table.accuracy[0]}
    assert plot_sweep(table.drop(columns='accuracy'))[0].get_ylabel() == 'valid_loss'


@pytest.mark.parametrize('how', [dict(arch='resnet'), dict(data='digit'), dict(sparsities='.5,90')])
def test_command_errors(how, tmp_path):
    with pytest.raises(SystemExit, match='ocp-sweep: '): sweep_network(out=tmp_path/'sweep.csv', **how)
