"Selection meets a full stable sort, written out here in plain Python."
import pytest, torch
from hypothesis import given, settings, strategies as st

from onecycle_prune.select.numpy_backend import lowest_, select_, sort_


def lowest(x, pruned, k):
    "What is pruned of one layer after the fast choice, which the sort has to agree with"
    res, sorted_ = pruned.clone(), pruned.clone()
    sort_([x], [sorted_], k)
    if x.is_cuda: return sorted_
    lowest_([x], [res], k)
    assert torch.equal(res, sorted_)
    return res


def select(scores, pruned, k, **kwargs):
    pruned = [g.clone() for g in pruned]
    select_(scores, pruned, k, **kwargs)
    return pruned


quick = settings(max_examples=150, deadline=None)
dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def ranking(x, pruned):
    "Positions in the order they go: the pruned first, whatever they score, then the lowest, of equals the first"
    x, pruned = x.tolist(), pruned.tolist()
    return sorted(range(len(x)), key=lambda i: (not pruned[i], 0 if pruned[i] else x[i], i))


def mark(n, positions):
    res = torch.zeros(n, dtype=torch.bool)
    res[list(positions)] = True
    return res


def check(x, pruned, ks):
    "`lowest` is the ranking's beginning at every k of `ks`, and leaves what it is given alone"
    order, x0, gone0 = ranking(x, pruned), x.clone(), pruned.clone()
    for k in ks:
        res = lowest(x, pruned, k)
        assert res.dtype == torch.bool and res.shape == x.shape
        assert torch.equal(res.cpu(), mark(len(x), order[:k])), f'k={k}'
        assert torch.equal(x, x0) and torch.equal(pruned, gone0)


values = dict(
    any=st.floats(-1e4, 1e4, width=16),
    tied=st.sampled_from([-1., -0., 0., .5, 2.]),  # the two zeros are equals
    tiny=st.sampled_from([i*2.**-24 for i in range(-4, 5)]),  # the steps of float16's smallest numbers
    constant=st.just(.25),
    positive=st.floats(0, 1, width=16))


@st.composite
def pools(draw, kind, sizes=st.integers(1, 40)):
    "Scores of one layer, and which of its groups are pruned"
    n, dtype = draw(sizes), draw(st.sampled_from(dtypes))
    fixed = lambda o: st.lists(o, min_size=n, max_size=n)
    x = torch.tensor(draw(fixed(kind)), dtype=dtype)
    return x, torch.tensor(draw(st.one_of(st.just([False]*n), st.just([True]*n), fixed(st.booleans()))))


@pytest.mark.parametrize('kind', values.values(), ids=values)
def test_lowest(kind):
    "Every k from none to all"
    @quick
    @given(pools(kind))
    def holds(pool): check(*pool, range(len(pool[0])+1))
    holds()


def test_by_hand():
    x, pruned = torch.tensor([3., 1., 2., 1., 9.]), mark(5, [4])
    # the last is pruned already, then go the two 1s from the front, the 2, and the 3
    for k, going in enumerate([[], [4], [4, 1], [4, 1, 3], [4, 1, 3, 2], [4, 1, 3, 2, 0]]):
        assert torch.equal(lowest(x, pruned, k), mark(5, going))


def test_float64():
    "Scores that are equals in single precision are told apart in double"
    x = 1 + torch.arange(5, 0, -1, dtype=torch.float64)*1e-12
    check(x, mark(5, []), range(6))


# Pools of more than twice 2**12 are ranked with the help of every (n//2**12)-th score: what those see is not what there is.
n_big = 5*2**12 + 3
i = torch.arange(n_big, dtype=torch.float32)
sampled = i % 5 == 0
noise = torch.rand(n_big, generator=torch.Generator().manual_seed(0))
adversaries = dict(
    random=noise, rising=i, falling=-i, constant=torch.ones(n_big),
    tied=(noise*7).floor(),
    sample_high=noise + sampled, sample_low=noise - sampled.float(),  # periodic with the very stride
    sample_flat=torch.where(sampled, .5, noise),
    spike=torch.where(i == 777, 1e30, noise), sampled_spike=torch.where(i == 775, -1e30, noise),
    half=noise.half(), bfloat=noise.bfloat16(), signed=noise-.5)
masks = dict(
    none=i < 0, few=noise > .99, most=noise > .01, sampled=sampled, unsampled=~sampled, front=i < n_big/3, all=i >= 0)


def ks_for(n, n_gone): return sorted({k for k in (0, 1, n//100, n//2, n-1, n, n_gone-1, n_gone, n_gone+1) if 0 <= k <= n})


@pytest.mark.parametrize('x', adversaries.values(), ids=adversaries)
def test_big(x): check(x, masks['none'], ks_for(n_big, 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_big_cuda():
    for x in adversaries.values(): check(x.cuda(), masks['few'].cuda(), ks_for(n_big, int(masks['few'].sum())))


@pytest.mark.parametrize('pruned', masks.values(), ids=masks)
@pytest.mark.parametrize('name', ['random', 'tied', 'sample_high'])
def test_big_gone(name, pruned): check(adversaries[name], pruned, ks_for(n_big, int(pruned.sum())))


@pytest.mark.parametrize('n', [2**12-1, 2**12, 2**12+1, 2**13-1, 2**13, 2**13+1])
def test_big_sizes(n): check((noise[:n]*50).floor(), masks['few'][:n], ks_for(n, int(masks['few'][:n].sum())))


def by_force(scores, pruned, k):
    "Hold back what goes last of each layer, and mark the k lowest of all others"
    held, start = set(), 0
    for x, g in zip(scores, pruned):
        held.add(start + ranking(x.flatten(), g.flatten())[-1])
        start += x.numel()
    order = ranking(torch.cat([x.flatten() for x in scores]), torch.cat([g.flatten() for g in pruned]))
    res = mark(start, [i for i in order if i not in held][:k]).split([x.numel() for x in scores])
    return [r.view_as(x) for r, x in zip(res, scores)]


def same(a, b): return len(a) == len(b) and all(torch.equal(*o) for o in zip(a, b))


@st.composite
def shared_pools(draw):
    kind, dtype = draw(st.sampled_from(list(values.values()))), draw(st.sampled_from(dtypes))
    layers = draw(st.lists(pools(kind, st.integers(1, 9)), min_size=1, max_size=5))
    # small scores in some layers, so that they would be the ones to die
    scale = draw(st.lists(st.sampled_from([.01, 1.]), min_size=len(layers), max_size=len(layers)))
    return [(x*s).to(dtype) for (x, _), s in zip(layers, scale)], [g for _, g in layers]


@quick
@given(shared_pools())
def test_select(pool):
    scores, pruned = pool
    n, given_ = sum(map(len, scores)), [t.clone() for t in scores+pruned]
    for k in range(n - len(scores) + 1):
        res = select(scores, pruned, k)
        assert sum(int(r.sum()) for r in res) == k
        assert not any(r.all() for r in res)
        assert same(res, by_force(scores, pruned, k)), f'k={k}'
        assert same(scores+pruned, given_)


def test_select_by_hand():
    scores, none = [torch.tensor([.1, .1]), torch.tensor([1., 3., 2.])], [mark(2, []), mark(3, [])]
    # the second .1, going last of its layer, is held back: the 1 goes before it, then the 2
    for k, going in enumerate([([], []), ([0], []), ([0], [0]), ([0], [0, 2])]):
        assert same(select(scores, none, k), [mark(2, going[0]), mark(3, going[1])])


def test_select_shapes():
    "Scores of any shape and memory layout, a mask in the same shape for each"
    g = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, 3, 2, 2, generator=g).to(memory_format=torch.channels_last), torch.rand(4, 5, generator=g).T]
    pruned = [torch.rand(x.shape, generator=g) > .8 for x in scores]
    for k in (5, 20, 42): assert same(select(scores, pruned, k), by_force(scores, pruned, k))


def test_select_without_keep():
    "Layers may go as a whole where they are the groups"
    scores = [torch.tensor([2.]), torch.tensor([1.]), torch.tensor([3.])]
    assert [bool(r) for r in select(scores, [mark(1, [])]*3, 2, keep=False)] == [True, True, False]


def test_select_big():
    "A small layer of the lowest scores beside a big one, with the sample in use"
    scores, pruned = [noise[:1000]*1e-3, noise + .5], [masks['none'][:1000], masks['few']]
    for k in (999, 1000, 1001+int(pruned[1].sum()), n_big): assert same(select(scores, pruned, k), by_force(scores, pruned, k))
