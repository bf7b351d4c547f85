"Experts in one parameter of the shape (experts, outputs, inputs) are pruned as linear layers in a list are."
import warnings
from functools import partial

import pytest, torch
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.criteria import Variety
from onecycle_prune.granularity import get_granularity
from onecycle_prune.layers import choose
from onecycle_prune.report import sparsity_report
from onecycle_prune.schedule import one_cycle
from onecycle_prune.select import core
from onecycle_prune.select.reference import Reference
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import Probe, assert_resumes, assert_same
from networks import n_batches, tiny_learner

shapes = dict(up=(3, 24, 32), down=(3, 16, 24))  # (experts, outputs, inputs)


class Mixture(nn.Module):
    "A mixture of three experts, each of two layers: 32 inputs, 24 hidden units, 16 outputs"
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 3)
        for name, shape in shapes.items(): setattr(self, name, nn.Parameter(torch.randn(shape)/shape[-1]**.5))
    def forward(self, x):
        hidden = torch.matmul(x, self.up.mT).relu()  # (experts, items, hidden units)
        shares = self.gate(x).softmax(-1)
        return torch.einsum('ebo,be->bo', torch.matmul(hidden, self.down.mT), shares)


def mixture_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(), Mixture(), nn.Linear(16, 4))


both = ['2.up', '2.down']


def lists():
    "The same experts as lists of linear layers"
    return nn.ModuleDict({n: nn.ModuleList(nn.Linear(i, o, bias=False) for _ in range(e))
        for n, (e, o, i) in shapes.items()})


def sixteenths(shape, gen):
    "Numbers whose sums are exact in any order, so that means of groups have ties"
    return torch.randint(-64, 65, shape, generator=gen)/16


def use_backend(name, monkeypatch):
    "Let `select` use only this backend, or for 'fused' its own choice"
    if name == 'fused': pytest.importorskip('numba')
    if name == 'triton':
        triton = pytest.importorskip('onecycle_prune.select.triton_backend')
        monkeypatch.setattr(core, '_fused_backends', lambda device, dtype: [triton.TritonBackend] if dtype else [])
    if name == 'numpy': monkeypatch.setattr(core, '_fused_backends', lambda device, dtype: [])
    if name == 'reference': monkeypatch.setattr(core, 'backends', lambda device, dtype: [Reference])
    if hasattr(core.backends, 'cache_clear'): core.backends.cache_clear()


@pytest.fixture
def choose_backend(monkeypatch):
    yield partial(use_backend, monkeypatch=monkeypatch)
    monkeypatch.undo()
    core.backends.cache_clear()


def targets(kind, progress):
    "What is pruned now: each parameter alone, both in one pool, or each to its own sparsity"
    return dict(local=dict.fromkeys(shapes, progress), dict=dict(up=progress, down=.6*progress)).get(kind, progress)


def prune_in_steps(net, layers, granularity, context, criterion, sparsities):
    "The masks of all experts after each step, for layers {name of a stack: names of the layers that hold its experts}"
    gen = torch.Generator().manual_seed(1)
    def draw(n): return sixteenths(shapes[n], gen).view(len(layers[n]), *net.get_parameter(layers[n][0]).shape)
    def change():
        for n in shapes:
            for name, step, grad in zip(layers[n], draw(n), draw(n)):
                w = net.get_parameter(name)
                w.data += step
                w.grad = torch.empty_like(w).copy_(grad)
    for w in net.parameters(): w.data.zero_()
    change()
    sp = Sparsifier(net, granularity, context, criterion, layers=[*shapes])
    if criterion == 'random':  # The numbers of the two networks are drawn in another order.
        for n in shapes:
            for name, numbers in zip(layers[n], draw(n)): sp.memory[name.removesuffix('.weight')].copy_(numbers)
    found = []
    for sparsity in sparsities:
        change()
        sp.prune(sparsity)
        for n, (e, o, i) in shapes.items():
            masks = [sp.masks[name.removesuffix('.weight')] for name in layers[n]]
            for name, mask in zip(layers[n], masks): assert not net.get_parameter(name)[~mask].any()
            found.append(torch.stack(masks).view(e, o, i))
    return found


def assert_as_linear_layers(granularity, most, kind, criterion, transposed, choose_backend, backend):
    "The groups that a backend prunes, step by step, are those that a stable sort prunes in lists of linear layers"
    net, twin = Mixture(), lists()
    if transposed:  # the same numbers, with the outputs as neighbours in memory
        for n, (e, o, i) in shapes.items(): getattr(net, n).data = torch.zeros(e, i, o).mT
    steps = [most*o for o in (.1, .4, .4, .8, 1.)]
    context = 'local' if kind == 'local' else 'global'
    choose_backend(backend)
    found = prune_in_steps(net, {n: [n] for n in shapes}, granularity, context, criterion,
        steps if kind == 'local' else [targets(kind, s) for s in steps])
    choose_backend('reference')
    # In a list, the experts of one entry of a dict are one pool.
    expected = prune_in_steps(twin, {n: [f'{n}.{k}.weight' for k in range(3)] for n in shapes}, granularity, 'global',
        criterion, [targets(kind, s) for s in steps])
    assert_same(found, expected)
    assert not all(mask.all() for mask in found[-2:])


granularities = pytest.mark.parametrize('granularity,most', [
    ('weight', .9), ('row', .7), ('column', .7), ('2:4', .5), ('1:4', .75)])
layouts = pytest.mark.parametrize('transposed', [False, True], ids=['contiguous', 'transposed'])


@pytest.mark.parametrize('backend', ['fused', 'numpy', 'reference'])
@pytest.mark.parametrize('criterion', ['large_final', 'taylor', 'magnitude_increase', 'random'])
@pytest.mark.parametrize('kind', ['local', 'global', 'dict'])
@granularities
@layouts
def test_as_linear_layers(granularity, most, kind, criterion, backend, transposed, choose_backend):
    assert_as_linear_layers(granularity, most, kind, criterion, transposed, choose_backend, backend)


@granularities
@layouts
def test_triton(granularity, most, transposed, choose_backend):
    "Without a GPU, Triton's interpreter runs the kernels"
    assert_as_linear_layers(granularity, most, 'local', 'large_final', transposed, choose_backend, 'triton')


def test_erk():
    "A stack keeps as many weights as its experts do in a list of linear layers"
    def _pruned(net):
        sp = Sparsifier(net, context='erk', layers=[*shapes])
        sp.prune(.6)
        return {n: sum(int((~mask).sum()) for name, mask in sp.masks.items() if name.startswith(n)) for n in shapes}
    found = _pruned(Mixture())
    assert found == pytest.approx(_pruned(lists()), abs=3)  # Each list rounds three times.
    assert sum(found.values()) == round(.6*3*(24*32 + 16*24))


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('granularity,n_groups,count', [
    ('weight', (3*24*32, 3*16*24), lambda w: int((w == 0).sum())),
    ('row', (3*24, 3*16), lambda w: int((w == 0).all(2).sum())),
    ('column', (3*32, 3*24), lambda w: int((w == 0).all(1).sum())),
    ('2:4', (3*24*32, 3*16*24), lambda w: int((w == 0).sum()))])
def test_counts_in_training(granularity, n_groups, count, context, tmp_path):
    "Exact counts after every batch of a training"
    final, learn = .5, tiny_learner(tmp_path, mixture_net())
    seen = Probe(lambda model: [count(w.data) for w in (model[2].up, model[2].down)])
    learn.fit_one_cycle(3, 1e-2, cbs=[SparsifyCallback(final, granularity, context, layers=both), seen])
    n = 3*n_batches
    wanted = [final*one_cycle((i+1)/n) for i in range(n)]
    if context == 'local': assert seen.seen == [[round(s*k) for k in n_groups] for s in wanted]
    else: assert [sum(o) for o in seen.seen] == [round(s*sum(n_groups)) for s in wanted]
    if granularity == '2:4':
        for w in (learn.model[2].up, learn.model[2].down): assert ((w == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_dict_in_training(tmp_path):
    "Each parameter has a sparsity of its own, and linear layers are pruned with it"
    learn = tiny_learner(tmp_path, mixture_net())
    sparsities = {'2.up': .75, '2.down': .25, nn.Linear: .5}
    learn.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback(sparsities, 'row', layers=[*both, '2.gate', '3']))
    net = learn.model
    kept = [w.flatten(0, -2).any(1).sum().item() for w in (net[2].up, net[2].down, net[3].weight)]
    assert kept == [72*.25, 48*.75, 2]
    report = sparsity_report(learn)
    experts = report[(report.layer == 'not a layer') & (report.kind == 'Mixture')].iloc[0]
    assert (experts.weights, experts.zeros) == (72*32 + 48*24, 54*32 + 12*24)


@pytest.mark.parametrize('granularity,context', [('2:4', 'global'), ('row', 'local'), ('column', 'global')])
def test_resumes(granularity, context, tmp_path):
    def make(): return tiny_learner(tmp_path, mixture_net())
    whole = assert_resumes(make, granularity=granularity, context=context, layers=both, sparsity=.5)
    assert (whole.model[2].up == 0).any()


@pytest.mark.parametrize('granularity', ['filter', 'kernel', 'structured', 'head'])
def test_unsupported(granularity):
    "The error names the parameter, the module that holds it, and the granularities that it has"
    net = mixture_net()
    message = rf"'2.up' \(Mixture\).* granularity '{granularity}', only 'weight', 'row', 'column', 'layer'"
    with pytest.raises(ValueError, match=message): Sparsifier(net, granularity, layers='2.up')


def test_indivisible():
    "It is the inputs of each expert that have to divide"
    net = nn.Module()
    net.w = nn.Parameter(torch.randn(4, 8, 6))
    message = "'w'.* 6 input channels do not divide by 4"
    with pytest.raises(ValueError, match=message): Sparsifier(net, '2:4', layers='w')


@pytest.mark.parametrize('shape', [(8, 8), (2, 2, 4, 4)])
def test_other_shapes(shape):
    "A parameter of another number of dimensions has no rows, since nothing says which axis is which"
    net = nn.Module()
    net.w = nn.Parameter(torch.randn(shape))
    for granularity in ('row', 'column', '2:4'):
        with pytest.raises(ValueError, match="'w'"): Sparsifier(net, granularity, layers='w')
    Sparsifier(net, 'weight', layers='w').prune(.5)
    assert (net.w == 0).sum() == net.w.numel()/2


@pytest.mark.parametrize('granularity', ['weight', 'row', '2:4'])
def test_only_by_name(granularity):
    "Experts are pruned only if `layers` asks for them, also without a warning"
    net = nn.ModuleDict(dict(gate=nn.Linear(32, 3), experts=Mixture()))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for layers in (None, nn.Linear, lambda m: True):
            assert [*choose(net, layers, get_granularity(granularity))] == ['gate', 'experts.gate']


def test_variety():
    "The rows of all experts are compared with each other, as those of one linear layer"
    net, flat = nn.Module(), nn.Linear(5, 12)
    net.w = nn.Parameter(flat.weight.detach().view(3, 4, 5).clone())
    layer = choose(net, 'w', get_granularity('row'))['w']
    torch.testing.assert_close(Variety()(layer).flatten(0, 1), Variety()(flat))
