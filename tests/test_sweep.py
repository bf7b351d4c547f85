"The fast lane does what score, select and zero do: against a stable sort, in both forms of the pass."
import pytest, torch
from hypothesis import given, settings, strategies as st
from onecycle_prune import sweep
from onecycle_prune.sparsifier import Sparsifier
from onecycle_prune.sweep import go_, sweep_, zero_
from torch import nn

from conftest import assert_same, bits, tiny_net

quick = settings(max_examples=100, deadline=None)
dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=['compiled', 'numpy'])
def lane(request, monkeypatch):
    "Each form of the pass"
    if request.param == 'compiled': pytest.importorskip('numba')
    monkeypatch.setattr(sweep, '_pass', getattr(sweep, f'_pass_{request.param}'))


def reference(weights, gone, k):
    "Masks of the pool by a stable sort: what is gone first, then the lowest magnitudes"
    keys = torch.cat([w.abs().double().masked_fill(g, -1).flatten() for w, g in zip(weights, gone)])
    res = torch.zeros(len(keys), dtype=torch.bool)
    res[keys.argsort(stable=True)[:k]] = True
    return [r.view_as(g) for r, g in zip(res.split([g.numel() for g in gone]), gone)]


def check(weights, gone, k):
    "The masks and the weights, where `sweep_` takes it on; whether it did"
    expected, w0 = reference(weights, gone, k), [w.clone() for w in weights]
    n_gone = sum(int(g.sum()) for g in gone)
    going = sweep_(weights, gone, k-n_gone)
    if going is None: return False
    for w, g, i in zip(weights, gone, going): go_(w, g, i)
    assert_same(gone, expected)
    assert_same(weights, [torch.where(g, 0, w) for w, g in zip(w0, expected)])
    return True


@st.composite
def pools(draw):
    dtype, values = draw(st.sampled_from(dtypes)), draw(st.sampled_from([
        st.floats(-1e4, 1e4, width=16), st.sampled_from([-1., -0., 0., .5, 2.]), st.just(-.25), st.sampled_from([i*2.**-24 for i in range(-4, 5)])]))
    def layer(n): return torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=dtype), torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return list(map(list, zip(*[layer(draw(st.integers(1, 20))) for _ in range(draw(st.integers(1, 4)))])))


@pytest.mark.usefixtures('lane')
def test_sweep():
    "Every k, and only what is out of the ordinary is handed back"
    @quick
    @given(pools())
    def holds(pool):
        weights, gone = pool
        n, n_gone = sum(map(len, gone)), sum(int(g.sum()) for g in gone)
        for k in range(n+1):
            args = [w.clone() for w in weights], [g.clone() for g in gone]
            dies = len(gone) > 1 and any(r.all() and not g.all() for r, g in zip(reference(weights, gone, k), gone))
            assert check(*args, k) == (k >= n_gone and not dies) or any(g.all() for g in gone)
    holds()


@pytest.mark.parametrize('dtype', dtypes, ids=str)
@pytest.mark.usefixtures('lane')
def test_sweep_big(dtype):
    "Over several blocks, with the sample in use, from nothing gone to nearly all"
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=g).to(dtype) for n in (70_001, 900, 20_000)]
    gone = [torch.zeros(len(w), dtype=torch.bool) for w in weights]
    for k in (0, 1, 300, 301, 30_000, 30_000, 85_000):
        assert check(weights, gone, k)
        for w in weights: w.add_(torch.randn(w.shape, generator=g).to(dtype) * .01)


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures('lane')
def test_not_finite(value):
    "Handed back if it stays, zeroed if it is gone"
    w, gone = torch.arange(1., 9), torch.zeros(8, dtype=torch.bool)
    w[3] = value
    assert sweep_([w], [gone], 2) is None
    gone[3] = True
    assert check([w], [gone], 3) and w[3] == 0


@pytest.mark.usefixtures('lane')
def test_large_weights():
    "Weights whose exponents together have all the bits of infinity, and are finite all the same"
    assert check([torch.tensor([1.5, 2.5, -3., 1.])], [torch.zeros(4, dtype=torch.bool)], 2)


def test_handed_back():
    w, gone = torch.rand(4, 5, 6, 6), torch.zeros(4, 5, 6, 6, dtype=torch.bool)
    layout = torch.channels_last
    assert sweep_([w.to(memory_format=layout)], [gone], 3) is None
    assert sweep_([w, w.double()], [gone, gone], 3) is None
    assert sweep_([w], [gone], -1) is None
    assert sweep_([w], [gone], 3) is not None


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.usefixtures('lane')
def test_same_as_scored(context):
    "A criterion that scores as `large_final` but is not it goes the other way, to the same weights"
    nets = [tiny_net(), tiny_net()]
    sps = [Sparsifier(net, context=context, criteria=c) for net, c in zip(nets, ('large_final', lambda m: m.weight.abs()))]
    for s in (0, .3, .3, .8, .99, .5, .9, 0, .2):
        for net, sp in zip(nets, sps):
            sp.prune(s)
            torch.manual_seed(int(100*s))
            with torch.no_grad():
                for p in net.parameters(): p.add_(torch.randn_like(p)*.01)
        assert_same(*map(bits, nets))
        assert_same(*(sp.masks for sp in sps))


def test_nothing_gone_nothing_touched():
    "Before pruning begins no weight is written"
    net = tiny_net()
    sp, before = Sparsifier(net), [p._version for p in net.parameters()]
    for _ in range(2): sp.prune(0)
    assert before == [p._version for p in net.parameters()]
    sp.prune(.5)
    assert before != [p._version for p in net.parameters()]


@pytest.mark.parametrize('shape', [(3, 1), (1, 4), (3, 4), ()])
def test_zero_broadcasts(shape):
    t = torch.randn(3, 4)
    gone = torch.ones(shape, dtype=torch.bool)
    gone.view(-1)[1:2] = False
    expected = t.masked_fill(gone, 0)
    zero_(t, gone)
    assert torch.equal(t, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_gpu(context, granularity):
    "The masks of a CPU, and the host never waits after the first batch"
    nets = [tiny_net(), tiny_net().cuda().to(memory_format=torch.channels_last)]
    layers = nn.Conv2d
    cpu, gpu = (Sparsifier(net, granularity, context, layers=layers) for net in nets)
    for sp in (cpu, gpu): sp.prune(.1)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for s in (.1, .2, .5, .9, .3): gpu.prune(s)
    finally: torch.cuda.set_sync_debug_mode('default')
    for s in (.1, .2, .5, .9, .3): cpu.prune(s)
    assert_same(cpu.masks, {n: m.cpu() for n, m in gpu.masks.items()})
