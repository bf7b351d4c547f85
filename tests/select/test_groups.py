"Groups of weights that one pass scores, adds up and zeroes are those of the general way."
import pytest, torch
from onecycle_prune.criteria import Criteria, criteria, needs_gradient
from onecycle_prune.granularity import Granularity, granularities
from onecycle_prune.select.core import Problem, select
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits

kernels = pytest.importorskip('onecycle_prune.select.numba_kernels')
from onecycle_prune.select.group_backend import GroupBackend  # noqa: E402

of_networks = ['structured', 'head']
of_groups = [o for o in granularities if o not in ('weight', 'unstructured', 'depth', 'shared_depth', *of_networks)]


def called(name):
    "The criterion without its formula, which is called in each step"
    fused = criteria[name]
    res = Criteria(fused.f, fused.memory) if isinstance(fused, Criteria) else lambda m: fused(m)
    return needs_gradient(res) if hasattr(fused, 'needs_gradient') else res


def network(last):
    net = nn.Sequential(nn.Conv2d(4, 40, 3), nn.BatchNorm2d(40), nn.Conv2d(40, 24, (1, 7), groups=2),
        nn.ConvTranspose2d(24, 16, 3), nn.Conv2d(16, 200, 1))
    return net.to(memory_format=torch.channels_last) if last else net


def change_(net, seed):
    "Steps of a 32nd, so that sums are exact in any order, and groups have ties"
    gen = torch.Generator().manual_seed(seed)
    def numbers(like): return torch.randint(-32, 33, like.shape, generator=gen).to(like.dtype)/32
    for p in net.parameters():
        p.data += numbers(p)
        p.grad = torch.empty_like(p).copy_(numbers(p))


def assert_counts(sp, s):
    "Exact counts, in each layer or in all together, and zeros where a group is pruned"
    sizes, counts = [p.numel() for p in sp.pruned.values()], [int(p.sum()) for p in sp.pruned.values()]
    if sp.context == 'local': assert counts == [min(round(s*n), n-1) for n in sizes]
    else:
        n_kept = 1 if sp.granularity.name == 'layer' else len(sizes)
        assert sum(counts) == min(round(s*sum(sizes)), sum(sizes) - n_kept)
    for n, kept in sp.masks.items(): assert not sp.layers[n].weight[~kept].any()


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels last'])
@pytest.mark.parametrize('granularity', of_groups)
@pytest.mark.parametrize('context', ['local', 'global'])
def test_same_as_called(granularity, context, last, threads, monkeypatch):
    if threads > 1 and kernels._threads_owner() is None: pytest.skip('numba has no threads to share here')
    if (granularity, context) == ('layer', 'local'): pytest.skip('whole layers compete with each other')
    monkeypatch.setattr(kernels, '_n_threads', lambda: threads)
    supports = Granularity(granularity).supports
    for name in ('large_final', 'small_final', 'random', 'taylor', 'movement', 'magnitude_increase',
                 'large_init_large_final'):
        nets, sps = [], []
        for criterion in (name, called(name)):
            torch.manual_seed(0)
            nets.append(network(last))
            change_(nets[-1], 99)
            sps.append(Sparsifier(nets[-1], granularity, context, criterion, layers=supports))
        for i, s in enumerate((0, .1, .3, .3, .6, .2, .9)):
            for net, sp in zip(nets, sps):
                change_(net, i)
                sp.prune(s)
            assert_same(*map(bits, nets))
            assert_same(*(sp.masks for sp in sps))
            assert_counts(sps[0], s)


@pytest.mark.parametrize('name', ['filter', 'kernel', 'channel'])
@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels last'])
def test_taken(name, last):
    "The layers of ordinary networks are taken, in both memory formats"
    group = Granularity(name)
    for m in [o for o in network(last) if type(o) is nn.Conv2d]:
        assert_means(m.weight.detach(), group.layout(m), group.reduce(m.weight.detach().abs(), m))


def assert_means(w, layout, means):
    masks = [torch.zeros(means.shape, dtype=torch.bool)]
    problem = Problem(masks, 1, None, [w], layouts=[layout])
    assert GroupBackend.supports(problem)
    torch.testing.assert_close(GroupBackend([problem]).scores, means.flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize('layout', [(3, 5, 1), (2, 1000, 1), (1, 4609, 1), (3, 64, 9), (2, 7, 300), (1, 65, 2),
                                    (70_000, 1, 1), (1, 2, 40_000)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_means(layout, dtype):
    "Means of any rows, long and short, in float64 in the order of torch"
    rows, span, inner = layout
    w = torch.randn(rows, span, inner, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert_means(w.flatten(), layout, w.double().abs().mean(1).to(dtype))


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_not_finite(value):
    "A score that is not finite raises before anything changes; a pruned group may hold anything"
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    sp = Sparsifier(net, 'kernel')
    sp.prune(.5)
    w, kept = net[1].weight.data, sp.masks['1']
    w[~kept] = value
    sp.prune(.55)
    assert w.isfinite().all()
    w.view(-1)[sp.masks['1'].flatten().nonzero()[7]] = value
    before, masks = bits(net), sp.masks
    with pytest.raises(ValueError, match="layer '1' are NaN or infinite"): sp.prune(.6)
    assert_same(bits(net), before)
    assert_same(sp.masks, masks)


def test_left_to_the_next():
    "Half precision, memory with gaps, and groups that return are left to the next backend"
    m = nn.Conv2d(4, 8, 3).requires_grad_(False)
    group = Granularity('filter')
    def problem(w, k=3, n_pruned=None):
        return Problem([torch.zeros(1, 8, 1, 1, 1, dtype=torch.bool)], k, lambda: [w.float().abs().mean((1, 2, 3))
            .view(1, 8, 1, 1, 1)], [w], n_pruned, layouts=[group.layout(m)])
    assert GroupBackend.supports(problem(m.weight))
    assert not GroupBackend.supports(problem(m.weight.half()))
    assert not GroupBackend.supports(problem(m.weight, 3, 4))
    half = m.weight.half()
    selection = select([problem(half)])
    selection.commit()
    assert [type(o).__name__ for o in selection.parts] == ['NumpyBackend']
    assert int((half.flatten(1) == 0).all(1).sum()) == 3
    m.weight.data = torch.stack([m.weight, m.weight], -1)[..., 0]
    assert group.layout(m) is None
