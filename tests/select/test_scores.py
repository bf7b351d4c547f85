"Selection from scores: the reference and numpy meet a full stable sort, written in plain Python."
import pytest, torch
from hypothesis import given, settings, strategies as st
from onecycle_prune.select.core import Problem, select
from onecycle_prune.select.numpy_backend import prune_lowest_numpy
from onecycle_prune.select.reference import prune_lowest

from networks import dtypes
from reference import by_force, mask_of, ranking

quick = settings(max_examples=150, deadline=None)


def prune_one(x, pruned, k):
    "The mask of a pool of one layer, on which both backends agree"
    by_sort, by_numpy = pruned.clone(), pruned.clone()
    prune_lowest([x], [by_sort], k)
    if x.is_cuda: return by_sort
    prune_lowest_numpy([x], [by_numpy], k)
    assert torch.equal(by_sort, by_numpy)
    return by_sort


def prune_pool(scores, pruned, k, protect=True):
    "The masks of a pool, on which both backends agree, and `select` too"
    masks = [[p.clone() for p in pruned] for _ in range(3)]
    prune_lowest(scores, masks[0], k, protect)
    prune_lowest_numpy(scores, masks[1], k, protect)
    select([Problem(masks[2], k, lambda: scores, protect=protect)]).commit()
    assert same(masks[0], masks[1])
    # if the number does not change, `select` leaves the masks alone
    assert k == sum(int(p.sum()) for p in pruned) or same(masks[0], masks[2])
    return masks[0]


def same(a, b): return len(a) == len(b) and all(torch.equal(*o) for o in zip(a, b))


def check(x, pruned, ks):
    "At every k of `ks`, the mask is the beginning of the ranking, and the scores are not changed"
    order, x0 = ranking(x, pruned), x.clone()
    for k in ks:
        res = prune_one(x, pruned, k)
        assert res.dtype == torch.bool and res.shape == x.shape
        assert torch.equal(res.cpu(), mask_of(len(x), order[:k])), f'k={k}'
        assert torch.equal(x, x0)


values = dict(
    any=st.floats(-1e4, 1e4, width=16),
    tied=st.sampled_from([-1., -0., 0., .5, 2.]),  # the two zeros are ties
    tiny=st.sampled_from([i*2.**-24 for i in range(-4, 5)]),  # the steps of float16's smallest numbers
    constant=st.just(.25),
    positive=st.floats(0, 1, width=16))


@st.composite
def drawn_layer(draw, kind, sizes=st.integers(1, 40)):
    "Scores of one layer, and its mask"
    n, dtype = draw(sizes), draw(st.sampled_from(dtypes))
    def _list(values): return st.lists(values, min_size=n, max_size=n)
    x = torch.tensor(draw(_list(kind)), dtype=dtype)
    return x, torch.tensor(draw(st.one_of(st.just([False]*n), st.just([True]*n), _list(st.booleans()))))


@pytest.mark.parametrize('kind', values.values(), ids=values)
def test_every_k(kind):
    "Every k from none to all"
    @quick
    @given(drawn_layer(kind))
    def holds(layer): check(*layer, range(len(layer[0])+1))
    holds()


def test_by_hand():
    x, pruned = torch.tensor([3., 1., 2., 1., 9.]), mask_of(5, [4])
    # the last one is pruned already; then come the two 1s by index, the 2, and the 3
    for k, positions in enumerate([[], [4], [4, 1], [4, 1, 3], [4, 1, 3, 2], [4, 1, 3, 2, 0]]):
        assert torch.equal(prune_one(x, pruned, k), mask_of(5, positions))


def test_float64():
    "Scores that are equal in single precision differ in double"
    x = 1 + torch.arange(5, 0, -1, dtype=torch.float64)*1e-12
    check(x, mask_of(5, []), range(6))


# In pools of more than twice 2**11 scores, only a sample is looked at first, and it can be misleading.
n_big = 5*2**12 + 3
i = torch.arange(n_big, dtype=torch.float32)
sampled = i % 5 == 0
noise = torch.rand(n_big, generator=torch.Generator().manual_seed(0))
adversaries = dict(
    random=noise, rising=i, falling=-i, constant=torch.ones(n_big),
    tied=(noise*7).floor(),
    sample_high=noise + sampled, sample_low=noise - sampled.float(),  # with the period of the sample
    sample_flat=torch.where(sampled, .5, noise),
    spike=torch.where(i == 777, 1e30, noise), sampled_spike=torch.where(i == 775, -1e30, noise),
    half=noise.half(), bfloat=noise.bfloat16(), signed=noise-.5)
masks = dict(
    none=i < 0, few=noise > .99, most=noise > .01, sampled=sampled, unsampled=~sampled, front=i < n_big/3, all=i >= 0)


def ks_for(n, n_pruned):
    return sorted({k for k in (0, 1, n//100, n//2, n-1, n, n_pruned-1, n_pruned, n_pruned+1) if 0 <= k <= n})


@pytest.mark.parametrize('x', adversaries.values(), ids=adversaries)
def test_big(x): check(x, masks['none'], ks_for(n_big, 0))


@pytest.mark.gpu
def test_big_cuda():
    for x in adversaries.values(): check(x.cuda(), masks['few'].cuda(), ks_for(n_big, int(masks['few'].sum())))


@pytest.mark.parametrize('pruned', masks.values(), ids=masks)
@pytest.mark.parametrize('name', ['random', 'tied', 'sample_high'])
def test_big_pruned(name, pruned): check(adversaries[name], pruned, ks_for(n_big, int(pruned.sum())))


@pytest.mark.parametrize('n', [2**11-1, 2**11, 2**11+1, 2**12-1, 2**12, 2**12+1, 2**13-1, 2**13, 2**13+1])
def test_big_sizes(n): check((noise[:n]*50).floor(), masks['few'][:n], ks_for(n, int(masks['few'][:n].sum())))


@st.composite
def shared_pools(draw):
    kind, dtype = draw(st.sampled_from(list(values.values()))), draw(st.sampled_from(dtypes))
    layers = draw(st.lists(drawn_layer(kind, st.integers(1, 9)), min_size=1, max_size=5))
    # small scores in some layers, which would collapse
    scale = draw(st.lists(st.sampled_from([.01, 1.]), min_size=len(layers), max_size=len(layers)))
    return [(x*s).to(dtype) for (x, _), s in zip(layers, scale)], [p for _, p in layers]


@quick
@given(shared_pools())
def test_pool(pool):
    "Exactly k of a pool, and each layer keeps its best group, even one that was pruned whole"
    scores, pruned = pool
    n, scores0 = sum(map(len, scores)), [t.clone() for t in scores]
    for k in range(n - len(scores) + 1):
        res = prune_pool(scores, pruned, k)
        assert sum(int(r.sum()) for r in res) == k
        if len(res) > 1: assert not any(r.all() for r in res)
        assert same(res, by_force(scores, pruned, k)) or len(res) == 1, f'k={k}'
        assert same(scores, scores0)


def test_pool_by_hand():
    scores, none = [torch.tensor([.1, .1]), torch.tensor([1., 3., 2.])], [mask_of(2, []), mask_of(3, [])]
    # The second .1 would be pruned last of its layer, so it is protected. The 1 is pruned instead, then the 2.
    for k, (small, large) in enumerate([([], []), ([0], []), ([0], [0]), ([0], [0, 2])]):
        assert same(prune_pool(scores, none, k), [mask_of(2, small), mask_of(3, large)])


def test_shapes():
    "Scores of any shape and memory layout, with a mask in the same shape for each"
    g = torch.Generator().manual_seed(0)
    images, rows = torch.rand(2, 3, 2, 2, generator=g), torch.rand(4, 5, generator=g)
    scores = [images.to(memory_format=torch.channels_last), rows.T]
    pruned = [torch.rand(x.shape, generator=g) > .8 for x in scores]
    for k in (5, 20, 42): assert same(prune_pool(scores, pruned, k), by_force(scores, pruned, k))


def test_mask_in_another_layout():
    "A mask that does not lie in memory as its scores is changed in place too"
    mask = torch.zeros(3, 4, dtype=torch.bool).T
    prune_lowest_numpy([torch.arange(12.).view(4, 3)], [mask], 5)
    assert mask.flatten().tolist() == [True]*5 + [False]*7


def test_without_protection():
    "Layers may be pruned whole where they are the groups"
    scores = [torch.tensor([2.]), torch.tensor([1.]), torch.tensor([3.])]
    assert [bool(r) for r in prune_pool(scores, [mask_of(1, [])]*3, 2, protect=False)] == [True, True, False]


def test_pool_big():
    "A small layer with the lowest scores next to a big one, with the sample in use"
    scores, pruned = [noise[:1000]*1e-3, noise + .5], [masks['none'][:1000], masks['few']]
    for k in (999, 1000, 1001+int(pruned[1].sum()), n_big):
        assert same(prune_pool(scores, pruned, k), by_force(scores, pruned, k))
