"The sweep of a GPU against a stable sort: on a GPU if there is one, else by Triton's interpreter. And that its kernels compile for GPUs."
import os, subprocess, sys, weakref

import pytest, torch
from hypothesis import given, settings, strategies as st
from onecycle_prune.select import numba_backend as sweep
from onecycle_prune.sparsifier import Sparsifier
from onecycle_prune.select.numba_backend import sweep_
from torch import nn

from conftest import assert_same, bits, by_sort, drawn_pool, dtypes, tiny_net

kernels = pytest.importorskip('onecycle_prune.select.triton_backend')
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch): monkeypatch.setattr(sweep, '_sweep_of', lambda device, dtype: kernels.Sweep)


def check(pools):
    "The masks and the weights of the pools, each (weights, pruned, how many more go)"
    pools = [([w.to(device) for w in ws], [g.to(device) for g in pruned], more) for ws, pruned, more in pools]
    expected = [by_sort(ws, pruned, sum(int(g.sum()) for g in pruned) + more, keep=len(pruned) > 1) for ws, pruned, more in pools]
    w0 = [[w.clone() for w in ws] for ws, *_ in pools]
    swept, finite, go = sweep_(pools)
    assert all(swept) and finite.all()
    go()
    for (ws, pruned, _), exp, old in zip(pools, expected, w0):
        assert_same(pruned, exp)
        assert_same(ws, [torch.where(g, 0, w) for w, g in zip(old, exp)])


def alive(weights, pruned): return sum(int((~g).sum()) for g in pruned) - (len(pruned) if len(pruned) > 1 else 0)


@st.composite
def pools(draw):
    dtype = st.just(draw(st.sampled_from(dtypes)))
    def pool():
        weights, pruned = draw(drawn_pool(dtype))
        for g in pruned: g[draw(st.integers(0, len(g)-1))] = False
        return weights, pruned, draw(st.integers(0, alive(weights, pruned)))
    return [pool() for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=60, deadline=None)
@given(pools())
def test_small(pools): check(pools)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', dtypes, ids=str)
def test_big(dtype, layout):
    "Several stretches, equals at the last magnitude, in few and in half of the weights, and a pool that loses nothing"
    torch.manual_seed(0)
    def layer(*shape):
        w = (torch.randn(shape)*100).round().div(64).to(dtype).to(memory_format=layout)
        return w, torch.rand(shape).to(memory_format=layout) < .4
    for share in (.01, .5, 1):
        many = [[layer(50, 40, 3, 3), layer(7, 3, 1, 1), layer(3, 7, 5, 5)], [layer(2, 3, 3, 3)], [layer(60, 30, 3, 3)]]
        many = [tuple(map(list, zip(*o))) for o in many]
        check([(ws, pruned, n) for (ws, pruned), n in zip(many, [int(share*alive(*many[0])), 0, int(share*alive(*many[2]))])])


def test_volumes():
    "Three-dimensional convolutions in their own layout"
    torch.manual_seed(0)
    w = torch.randn(4, 3, 2, 3, 2).round().to(memory_format=torch.channels_last_3d)
    for n in (1, 70): check([([w.clone()], [torch.zeros_like(w, dtype=torch.bool)], n)])


@pytest.mark.parametrize('last', [1499, 1000, 0])
def test_keep(last):
    "Of equals a layer keeps the last, however many stretches it has: here 1500, of 4096 weights each"
    n = torch.arange(1500, device=device)
    tops = torch.stack([torch.where(n <= last, 7, 6), n*4096], 1)
    bests, highest, lefts, tallies = (torch.zeros(k, dtype=torch.int64, device=device) for k in (1, 1, 1, 2048))
    layer = torch.tensor([0, 0, 0, 1500*4096, 1, 1, 0, 0, 1500, 1], device=device)  # as the table of layers has it
    kernels._keep[(1,)](layer, tops, bests, tallies, highest, lefts + 1, 0)
    assert (bests.item(), highest.item()) == (last*4096, 7)
    assert tallies.nonzero().tolist() == [[7]] and tallies[7] == -1


@pytest.mark.parametrize('odd', [torch.nan, torch.inf, -torch.inf])
def test_not_finite(odd):
    "It is told where a pool loses any, unless it is pruned already"
    w, clean = torch.tensor([1., odd, 2.], device=device), torch.ones(3, device=device)
    none, out = torch.zeros(3, dtype=torch.bool, device=device), torch.tensor([False, True, False], device=device)
    _, finite, _ = sweep_([([w.clone()], [none.clone()], 1), ([w.clone()], [none.clone()], 0), ([w.clone()], [out], 1), ([clean], [none.clone()], 1)])
    assert finite.tolist() == [False, True, True, True]


def test_only_the_plain():
    "Weights that return, or lie elsewhere than their mask, are for the general way, and what is told of the others is told of them"
    w = torch.tensor([[1., torch.nan], [3., 4.]], device=device)
    def pruned(): return torch.zeros(2, 2, dtype=torch.bool, device=device)
    swept, finite, go = sweep_([([w.clone()], [pruned()], -1), ([w.clone().T], [pruned()], 1), ([w.clone()], [pruned()], 1)])
    assert swept == [False, False, True] and finite.tolist() == [True, True, False]


@pytest.mark.parametrize('context', ['local', 'global'])
def test_sparsifier(context, monkeypatch):
    "The same as the general way, batch by batch, with weights that move in between"
    def _train(net):
        sp, g = Sparsifier(net, context=context), torch.Generator().manual_seed(0)
        for s in (.1, .1, .5, .9, .3, .6):
            sp.prune(s)
            yield bits(net), {n: m.clone() for n, m in sp.masks.items()}
            with torch.no_grad():
                for p in net.parameters(): p += .1*torch.randn(p.shape, generator=g).to(device)
    ours = list(_train(tiny_net().to(device)))
    monkeypatch.setattr(sweep, '_sweep_of', lambda device, dtype: None)
    for a, b in zip(ours, _train(tiny_net().to(device)), strict=True): assert_same(a, b)


def test_sparsifier_tells():
    "A network that diverges is refused: at once where the host sees it, a batch late where it is told"
    net = tiny_net().to(device)
    sp = Sparsifier(net)
    sp.prune(.1)
    with torch.no_grad(): net[3].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '3' are NaN or infinite"):
        for s in (.2, .3):
            sp.prune(s)
            if device.type == 'cuda': torch.cuda.synchronize()


@pytest.mark.parametrize('make', [kernels.Sweep, sweep._Sweep], ids=['kernels', 'loops'])
def test_held(make, monkeypatch):
    "What is known by its address alone is not freed before the sweep is done"
    if make is sweep._Sweep and (device.type != 'cpu' or not sweep.loops): pytest.skip('the loops are for a CPU with numba')
    monkeypatch.setattr(sweep, '_sweep_of', lambda device, dtype: make)
    tensors = torch.ones(4, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    held = [weakref.ref(t) for t in tensors]
    *_, go = sweep_([([tensors[0]], [tensors[1]], 3)])
    del tensors
    assert all(r() is not None for r in held)
    go()
    assert held[1]().tolist() == [True, True, True, False]


def test_autograd_is_told():
    "What a backward pass has saved is known to have changed"
    w = nn.Parameter(torch.randn(4, 4, device=device))
    y = (w*w).sum()
    *_, go = sweep_([([w], [torch.zeros(4, 4, dtype=torch.bool, device=device)], 3)])
    with torch.no_grad(): go()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.backward()


@pytest.mark.parametrize('fault, why', [(lambda *args: None, 'do not agree with a sort'), (lambda *args: 1/0, 'ZeroDivisionError')], ids=['wrong', 'broken'])
def test_distrust(fault, why, monkeypatch):
    "Kernels that err or do not run are not used, and it is said"
    monkeypatch.setattr(kernels.Sweep, 'go', fault)
    with pytest.warns(UserWarning, match=why): assert not kernels.trusted.__wrapped__(device, torch.float32)


compiling = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from onecycle_prune.select import triton_backend as kernels
types = dict(near='*i32', shift='i32', above='i32', INT='constexpr') # all others are addresses of int64
for f in (kernels._mark, kernels._keep, kernels._narrow, kernels._mark_again, kernels._tally_positions, kernels._let_go):
    for INT in (tl.int16, tl.int32, tl.int64) if 'INT' in f.arg_names else (None,):
        source = ASTSource(f, signature={n: types.get(n, '*i64') for n in f.arg_names}, constexprs={'INT': INT} if INT else {})
        for arch in (75, 80, 90): assert triton.compile(source, target=GPUTarget('cuda', arch, 32), options=dict(num_warps=8)).asm['cubin']
"""


def test_compiles():
    "For three generations of GPUs, without any"
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    run = subprocess.run([sys.executable, '-c', compiling], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
