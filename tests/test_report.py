"Tables and plots show the numbers of zeros in the weights."
import matplotlib.pyplot as plt
import pytest
from onecycle_prune.all import *
from torch import nn

from networks import tiny_net
from reference import n_zeros


@pytest.fixture
def pruned():
    "A network with a different sparsity in each layer"
    net = tiny_net()
    Sparsifier(net).prune({'0': .25, '3': .5, '8': .9})
    return net


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def count(w): return sum(1 for v in w.flatten().tolist() if v == 0)


def test_report_counts(pruned):
    for t in (pruned[1].weight, pruned[8].bias): t.data.zero_()  # neither is counted
    df = sparsity_report(pruned)
    assert list(df) == ['layer', 'kind', 'shape', 'weights', 'zeros', 'sparsity']
    for row, name in zip(df.itertuples(), '038'):
        w = pruned[int(name)].weight
        assert (row.layer, row.kind, row.shape) == (name, type(pruned[int(name)]).__name__, '×'.join(map(str, w.shape)))
        assert (row.weights, row.zeros, row.sparsity) == (w.numel(), count(w), count(w)/w.numel())
    assert df.zeros[:3].tolist() == [72, 576, 58]


def test_report_total(pruned):
    total = sparsity_report(pruned).iloc[3]
    assert (total.layer, total.weights, total.zeros, total.sparsity) == ('total', 1504, 706, 706/1504)


def test_report_reads_weights_alone(pruned):
    "The report shows the weights as they are now"
    pruned[0].weight.data.fill_(1.)
    assert sparsity_report(pruned).zeros[:4].tolist() == [0, 576, 58, 634]


def test_report_counts_shared_weight_once():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    a.weight.data.view(-1)[:4] = 0
    assert sparsity_report(nn.Sequential(a, b)).weights.tolist() == [16, 16, 16]


def test_report_takes_a_learner(new_learner, pruned):
    "A learner stands for its model"
    assert sparsity_report(new_learner(pruned)).equals(sparsity_report(pruned))


@pytest.mark.parametrize('use', [sparsity_report, plot_layers, lambda m: plot_layers({'a': tiny_net(), 'b': m})])
@pytest.mark.parametrize('model', [nn.Linear, tiny_net, 'resnet18', None])
def test_no_model(use, model):
    with pytest.raises(ValueError, match='A model is an nn.Module, or a Learner that has one, got'): use(model)


@pytest.mark.parametrize('model,n', [(nn.Sequential(), 0), (nn.BatchNorm1d(3), 6), (nn.Embedding(2, 3), 6)])
def test_report_without_layers(model, n):
    df = sparsity_report(model)
    assert df.layer[0] == 'total' and df[['weights', 'zeros', 'sparsity']].iloc[0].tolist() == [0, 0, 0]
    assert df.layer.iloc[-1] == 'model' and df.weights.iloc[-1] == n


def test_report_leaves_model(pruned):
    pruned.eval()
    before = n_zeros(pruned)
    sparsity_report(pruned)
    assert not pruned.training and n_zeros(pruned) == before


def bars(ax): return [[p.get_width() for p in c] for c in ax.containers]


def test_plot_layers(pruned):
    ax = plot_layers(pruned)
    assert bars(ax) == [[72/288, 576/1152, 58/64]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['0', '3', '8'] and ax.yaxis_inverted()
    assert ax.get_xlim() == (0, 1) and ax.get_legend() is None


def test_plot_layers_takes_a_learner(new_learner, pruned):
    assert bars(plot_layers(new_learner(pruned))) == [[72/288, 576/1152, 58/64]]


def test_plot_layers_compares(new_learner, pruned):
    "Models and learners may be mixed"
    ax = plot_layers({'dense': tiny_net(), 'pruned': new_learner(pruned)})
    assert bars(ax) == [[0, 0, 0], [72/288, 576/1152, 58/64]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['dense', 'pruned']


def test_plot_layers_on_axes(pruned):
    _, axs = plt.subplots(1, 2)
    assert plot_layers(pruned, ax=axs[1]) is axs[1] and not axs[0].patches


def test_plot_layers_without_layers():
    "If there is nothing to draw, the error says so in words of this package, not of pandas"
    with pytest.raises(ValueError, match='Nothing to draw.*no convolution and no linear layer'):
        plot_layers(nn.BatchNorm1d(3))


@pytest.mark.parametrize('skip', [0, 3, 5])
def test_plot_sparsity(new_learner, skip):
    "Both curves start and end with the same batch"
    learn = new_learner()
    learn.fit(3, 1e-2, cbs=SparsifyCallback(.9))
    ax = learn.recorder.plot_sparsity(skip_start=skip)
    right = next(a for a in ax.figure.axes if a is not ax)
    (loss,), (line,) = ax.lines, right.lines
    assert list(line.get_xdata()) == list(loss.get_xdata()) == list(range(skip, 15))
    assert list(line.get_ydata()) == learn.recorder.sparsities[skip:]
    assert line.get_ydata()[-1] == sum(n_zeros(learn.model).values())/1504 and right.get_ylim() == (0, 1)
    assert [float(v) for v in loss.get_ydata()] == [float(v) for v in learn.recorder.losses[skip:]]


def test_plot_sparsity_on_axes(new_learner):
    learn, (_, axs) = new_learner(), plt.subplots(1, 2)
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.9))
    assert learn.recorder.plot_sparsity(ax=axs[1]) is axs[1] and not axs[0].lines


def test_plot_sparsity_of_the_second_training(new_learner):
    learn = new_learner()
    for epochs, s in (3, .9), (2, .5): learn.fit(epochs, 1e-2, cbs=SparsifyCallback(s))
    ax = learn.recorder.plot_sparsity(skip_start=0)
    line = ax.figure.axes[-1].lines[0]
    assert len(line.get_ydata()) == 10 and line.get_ydata()[-1] == pytest.approx(.5, abs=1e-3)


@pytest.mark.parametrize('trained,message', [
    (False, 'was not trained yet, and so not pruned'), (True, 'the last fit was not pruned, and no fit before it')])
def test_plot_sparsity_without_pruning(new_learner, trained, message):
    learn = new_learner()
    if trained: learn.fit(1, 1e-2)
    with pytest.raises(ValueError, match=message+'.*SparsifyCallback'): learn.recorder.plot_sparsity()


def test_plot_sparsity_after_dense_training(new_learner):
    "The sparsities of an earlier fit are not drawn with the losses of the last fit"
    learn = new_learner()
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.9))
    learn.fit(2, 1e-2)
    with pytest.raises(ValueError, match='the last fit was not pruned. An earlier fit was'):
        learn.recorder.plot_sparsity()
