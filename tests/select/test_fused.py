"The fast lane does what score, select and zero do: against a stable sort, by one thread and by several."
import os, subprocess, sys

import pytest, torch
from fastai.torch_core import TensorBase
from hypothesis import given, settings, strategies as st
from onecycle_prune.select import numba_backend as sweep
from onecycle_prune.sparsifier import Sparsifier
from onecycle_prune.select.numba_backend import sweep_, zero_
from torch import nn

from conftest import assert_same, bits, by_sort, drawn_pool, dtypes, tiny_net

loops = pytest.importorskip('onecycle_prune.select.numba_kernels')
quick = settings(max_examples=100, deadline=None)


@pytest.fixture(params=['one thread', 'several'])
def threads(request, monkeypatch):
    "As many threads"
    if request.param == 'several':
        if loops._home() is None or loops.numba.config.NUMBA_NUM_THREADS < 2: pytest.skip('numba has no threads to share here')
        monkeypatch.setattr(loops, '_n_threads', lambda: 2)
    else: monkeypatch.setattr(loops, '_n_threads', lambda: 1)


def check(pools):
    "The masks and the weights of the pools that are swept, each (weights, pruned, k); which are"
    expected, w0 = [by_sort(*p) for p in pools], [[w.clone() for w in ws] for ws, *_ in pools]
    swept, _, go = sweep_([(ws, pruned, k - sum(int(g.sum()) for g in pruned)) for ws, pruned, k in pools])
    before = [[g.clone() for g in pruned] for _, pruned, _ in pools]
    go()
    for (ws, pruned, _), exp, old, was, s in zip(pools, expected, w0, before, swept):
        assert_same(pruned, exp if s else was)
        if s: assert_same(ws, [torch.where(g, 0, w) for w, g in zip(old, exp)])
    return swept


def out_of_the_ordinary(weights, pruned, k):
    "Whether weights return or a layer dies, as far as equals let it be seen"
    if k < sum(int(g.sum()) for g in pruned): return True
    last = max((w.abs()[r & ~g].max() for w, g, r in zip(weights, pruned, by_sort(weights, pruned, k)) if (r & ~g).any()), default=None)
    return len(pruned) > 1 and last is not None and any((g | (w.abs() <= last)).all() and not g.all() for w, g in zip(weights, pruned))


@pytest.mark.usefixtures('threads')
def test_sweep():
    "Every k of one pool, beside others, and only what is out of the ordinary is handed back"
    @quick
    @given(st.lists(drawn_pool(), min_size=1, max_size=3), st.data())
    def holds(many, data):
        (weights, pruned), *others = [o for o in many if o[0][0].dtype == many[0][0][0].dtype]
        others = [(*o, data.draw(st.integers(0, sum(map(len, o[1]))))) for o in others]
        for k in range(sum(map(len, pruned))+1):
            now = [([w.clone() for w in ws], [g.clone() for g in gs], n) for ws, gs, n in [(weights, pruned, k), *others]]
            expected = [(not out_of_the_ordinary(*o), any(g.all() for g in o[1])) for o in now]
            assert all(s == e or all_gone for s, (e, all_gone) in zip(check(now), expected, strict=True))
    holds()


@pytest.mark.parametrize('dtype', dtypes, ids=str)
@pytest.mark.usefixtures('threads')
def test_sweep_big(dtype):
    "Over several stretches, with the sample in use, from nothing pruned to nearly all"
    g = torch.Generator().manual_seed(0)
    def layers(*sizes): return [torch.randn(n, generator=g).to(dtype) for n in sizes], [torch.zeros(n, dtype=torch.bool) for n in sizes]
    n = loops.stretch
    shared, single = layers(2*n+1, 900, n, 20_000), layers(n+1030)
    for s in (0, .001, .002, .002, .3, .3, .95):
        assert all(check([(*o, round(s*sum(map(len, o[0])))) for o in (shared, single)]))
        for w in shared[0]+single[0]: w.add_(torch.randn(w.shape, generator=g).to(dtype) * .01)


@pytest.mark.usefixtures('threads')
def test_equals():
    "Of equals the first go, across stretches and layers, and a sample that sees nothing else is no harm"
    n = loops.stretch
    weights, pruned = [torch.ones(2*n), torch.full((n//2,), -1.), torch.ones(n)], [torch.zeros(i, dtype=torch.bool) for i in (2*n, n//2, n)]
    pruned[0][5:n:3] = True
    weights[2][::1000] = .5
    for w in weights: w[-1] = 9  # no layer dies
    k = sum(int(g.sum()) for g in pruned)
    for more in (1, 70, n//3, n): assert check([(weights, [g.clone() for g in pruned], k+more)]) == [True]


def test_fork():
    "A forked process has none of its parent's threads, and does without"
    if not hasattr(os, 'fork') or loops._home() is None: pytest.skip('nothing to leave behind')
    pid = os.fork()
    if not pid: os._exit(3 if check([([torch.arange(9.)], [torch.zeros(9, dtype=torch.bool)], 4)]) == [True] and loops._n_threads() == 1 else 4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


@pytest.mark.parametrize('n', [1, 2, 3])
def test_threads_of_torch(n):
    "Torch keeps as many threads as it had when numba's are started"
    code = f"import torch; torch.set_num_threads({n}); from onecycle_prune.select import numba_kernels as loops; loops._home(); assert torch.get_num_threads() == {n}"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, timeout=60)


def test_number_of_threads(monkeypatch):
    "As many as torch has, but no more than numba's, and one where its threads are not for all"
    monkeypatch.setattr(loops, '_home', os.getpid)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 64)
    assert loops._n_threads() == loops.numba.config.NUMBA_NUM_THREADS
    monkeypatch.setattr(loops, '_home', lambda: None)
    assert loops._n_threads() == 1


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures('threads')
def test_not_finite(value):
    "Handed back if it stays, zeroed if it is pruned; the other pools go on"
    w, pruned = torch.arange(1., 9), torch.zeros(8, dtype=torch.bool)
    w[3] = value
    sound = [torch.arange(1., 9)], [torch.zeros(8, dtype=torch.bool)], 5
    assert check([([w], [pruned], 2), sound]) == [False, True]
    pruned[3] = True
    assert check([([w], [pruned], 3)]) == [True] and w[3] == 0


@pytest.mark.usefixtures('threads')
def test_large_weights():
    "Weights whose exponents together have all the bits of infinity, and are finite all the same"
    assert check([([torch.tensor([1.5, 2.5, -3., 1.])], [torch.zeros(4, dtype=torch.bool)], 2)]) == [True]


@pytest.mark.parametrize('shape,layout', [((8, 6, 3, 3), torch.channels_last), ((8, 6, 3, 3, 3), torch.channels_last_3d)], ids=['2d', '3d'])
@pytest.mark.usefixtures('threads')
def test_channels_last(shape, layout):
    "In the order of memory, but for equals of which only the first go"
    def last(t): return t.to(memory_format=layout)
    g = torch.Generator().manual_seed(0)
    w, pruned = torch.randn(shape, generator=g), torch.rand(shape, generator=g) < .3
    n = int(pruned.sum())
    plain = [torch.randn(50, generator=g)], [torch.zeros(50, dtype=torch.bool)], 7
    assert check([([last(w)], [last(pruned)], n+20), plain]) == [True, True]
    w.fill_(1).flatten()[::2] = .5
    halves = int(((w == .5) & ~pruned).sum())
    assert check([([last(w)], [last(pruned)], n+20), plain]) == [False, True]
    assert check([([last(w)], [last(pruned)], n+halves)]) == [True]  # all equals go


def test_handed_back(monkeypatch):
    w, pruned = torch.rand(4, 5, 6, 6), torch.zeros(4, 5, 6, 6, dtype=torch.bool)
    def swept(*pools): return sweep_(list(pools))[0]
    assert swept(([w.to(memory_format=torch.channels_last)], [pruned], 3), ([w], [pruned], 3)) == [False, True]
    assert swept(([w[:, ::2]], [pruned[:, ::2]], 3)) == [False]
    assert swept(([w, w.double()], [pruned, pruned], 3)) == [False]
    assert swept(([w], [pruned], 3), ([w.double()], [pruned], 3)) == [True, False]
    assert swept(([w], [pruned], -1)) == [False]
    assert swept(([w[:0]], [pruned[:0]], 0)) == [False]
    assert swept(([w.as_subclass(TensorBase)], [pruned], 3)) == [False]
    assert swept() == []
    monkeypatch.setattr(sweep, '_sweep_of', lambda device, dtype: None)  # without numba
    assert swept(([w], [pruned], 3)) == [False]


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.usefixtures('threads')
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
    pruned = torch.ones(shape, dtype=torch.bool)
    pruned.view(-1)[1:2] = False
    expected = t.masked_fill(pruned, 0)
    zero_(t, pruned)
    assert torch.equal(t, expected)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('context', ['local', 'global'])
def test_taken(monkeypatch, context, layout):
    "The layers of an ordinary model go by the fast lane, in channels-last too, but for groups of channels there"
    torch.manual_seed(0)
    groups = 4 if layout == torch.contiguous_format else 1
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 16, 1), nn.Linear(16, 4)).to(memory_format=layout)
    for m in net: nn.init.normal_(m.weight)  # alike, so that no layer dies
    monkeypatch.setattr(sparsifier, 'select_', lambda *args, **kwargs: pytest.fail('not by the fast lane'))
    sp = Sparsifier(net, context=context)
    for s in (.1, .5, .9): sp.prune(s)
    sizes = [m.numel() for m in sp.masks.values()]
    assert sum(int((~m).sum()) for m in sp.masks.values()) == (round(.9*sum(sizes)) if context == 'global' else sum(round(.9*n) for n in sizes))


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
