"Triton's kernels against a stable sort, on a GPU if there is one, else in Triton's interpreter; and their compilation"
import os, subprocess, sys, weakref

import pytest, torch
from hypothesis import given, settings, strategies as st
from onecycle_prune.select import core
from onecycle_prune.select.core import Problem, select
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits
from networks import drawn_pool, dtypes, tiny_net
from reference import by_sort

triton = pytest.importorskip('onecycle_prune.select.triton_backend')
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def use_backend(backend, monkeypatch):
    monkeypatch.setattr(core, '_fused_backends', lambda device, dtype: [backend] if dtype and backend else [])
    core.backends.cache_clear()


@pytest.fixture(autouse=True)
def use_triton(monkeypatch):
    use_backend(triton.TritonBackend, monkeypatch)
    yield
    core.backends.cache_clear()


def problem(weights, pruned, n_prune):
    k = sum(int(m.sum()) for m in pruned) + n_prune
    return Problem(pruned, k, lambda: pytest.fail('scores are not needed'), weights=weights)


def check(pools):
    "The masks and the weights of the pools, each (weights, pruned, n_prune)"
    pools = [([w.to(device) for w in ws], [m.to(device) for m in pruned], n) for ws, pruned, n in pools]
    problems = [problem(*p) for p in pools]
    expected = [by_sort(p.weights, p.pruned, p.k, keep=len(p.pruned) > 1) for p in problems]
    w0 = [[w.clone() for w in ws] for ws, *_ in pools]
    found = triton.TritonBackend(problems)
    assert all(p.fusable for p in problems) and found.finite.all() and not any(found.fallback)
    found.commit()
    for (ws, pruned, _), masks, old in zip(pools, expected, w0):
        assert_same(pruned, masks)
        assert_same(ws, [torch.where(m, 0, w) for w, m in zip(old, masks)])


def most(weights, pruned):
    "How many more weights of a pool can be pruned"
    return sum(int((~m).sum()) for m in pruned) - (len(pruned) if len(pruned) > 1 else 0)


@st.composite
def drawn_pools(draw):
    dtype = st.just(draw(st.sampled_from(dtypes)))
    def one():
        weights, pruned = draw(drawn_pool(dtype))
        for m in pruned: m[draw(st.integers(0, len(m)-1))] = False
        return weights, pruned, draw(st.integers(0, most(weights, pruned)))
    return [one() for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=60, deadline=None)
@given(drawn_pools())
def test_small(pools): check(pools)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', dtypes, ids=str)
def test_big(dtype, layout):
    "Several blocks, ties at the threshold, few and half of the weights, and a pool that loses nothing"
    torch.manual_seed(0)
    def layer(*shape):
        w = (torch.randn(shape)*100).round().div(64).to(dtype).to(memory_format=layout)
        return w, torch.rand(shape).to(memory_format=layout) < .4
    for share in (.01, .5, 1):
        many = [[layer(50, 40, 3, 3), layer(7, 3, 1, 1), layer(3, 7, 5, 5)], [layer(2, 3, 3, 3)], [layer(60, 30, 3, 3)]]
        many = [tuple(map(list, zip(*o))) for o in many]
        numbers = [int(share*most(*many[0])), 0, int(share*most(*many[2]))]
        check([(ws, pruned, n) for (ws, pruned), n in zip(many, numbers)])


def test_volumes():
    "Three-dimensional convolutions in their own layout"
    torch.manual_seed(0)
    w = torch.randn(4, 3, 2, 3, 2).round().to(memory_format=torch.channels_last_3d)
    for n in (1, 70): check([([w.clone()], [torch.zeros_like(w, dtype=torch.bool)], n)])


@pytest.mark.parametrize('last', [1499, 1000, 0])
def test_protect_best(last):
    "Of ties a layer keeps the last, however many blocks it has: here 1500, of 4096 weights each"
    n = torch.arange(1500, device=device)
    max_magnitude = torch.stack([torch.where(n <= last, 7, 6), n*4096], 1)
    def zeros(n): return torch.zeros(n, dtype=torch.int64, device=device)
    protected_idx, max_key, n_ties, histograms = zeros(1), zeros(1), zeros(1), zeros(2048)
    layer = torch.tensor([0, 0, 0, 1500*4096, 1, 1, 0, 0, 1500, 1], device=device)  # the fields of the table of layers
    triton._protect_best[(1,)](layer, max_magnitude, protected_idx, histograms, max_key, n_ties + 1, 0)
    assert (protected_idx.item(), max_key.item()) == (last*4096, 7)
    assert histograms.nonzero().tolist() == [[7]] and histograms[7] == -1


@pytest.mark.parametrize('odd', [torch.nan, torch.inf, -torch.inf])
def test_not_finite(odd):
    "A weight that is not finite is reported if its pool is pruned, unless it is pruned already"
    w, clean = torch.tensor([1., odd, 2.], device=device), torch.ones(3, device=device)
    none, out = torch.zeros(3, dtype=torch.bool, device=device), torch.tensor([False, True, False], device=device)
    pools = [([w.clone()], [none.clone()], 1), ([w.clone()], [none.clone()], 0), ([w.clone()], [out], 1),
             ([clean], [none.clone()], 1)]
    assert triton.TritonBackend([problem(*p) for p in pools]).finite.tolist() == [False, True, True, True]


def test_only_plain_weights():
    "Weights that return, or lie elsewhere than their mask, are left to another backend, and reports keep their order"
    w = torch.tensor([[1., torch.nan], [3., 4.]], device=device)
    def none(): return torch.zeros(2, 2, dtype=torch.bool, device=device)
    returning = Problem([~none()], 3, lambda: [w], weights=[w.clone()])
    turned = Problem([none()], 1, lambda: [w], weights=[w.clone().T])
    selection = select([returning, turned, problem([w.clone()], [none()], 1)])
    assert [type(p).__name__ for p in selection.parts][0] == 'TritonBackend'
    assert len(selection.parts[0].weights) == 1
    assert selection.finite.tolist() == [True, True, False]


@pytest.mark.parametrize('context', ['local', 'global'])
def test_sparsifier(context, monkeypatch):
    "The same as from scores, batch by batch, with weights that move in between"
    def _train(net):
        sp, g = Sparsifier(net, context=context), torch.Generator().manual_seed(0)
        for s in (.1, .1, .5, .9, .3, .6):
            sp.prune(s)
            yield bits(net), {n: m.clone() for n, m in sp.masks.items()}
            with torch.no_grad():
                for p in net.parameters(): p += .1*torch.randn(p.shape, generator=g).to(device)
    ours = list(_train(tiny_net().to(device)))
    use_backend(None, monkeypatch)
    for a, b in zip(ours, _train(tiny_net().to(device)), strict=True): assert_same(a, b)


def test_sparsifier_raises():
    "A network that diverges raises an error: at once on a CPU, a batch late on a GPU"
    net = tiny_net().to(device)
    sp = Sparsifier(net)
    sp.prune(.1)
    with torch.no_grad(): net[3].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '3' are NaN or infinite"):
        for s in (.2, .3):
            sp.prune(s)
            if device.type == 'cuda': torch.cuda.synchronize()


@pytest.mark.parametrize('name', ['triton', 'numba'])
def test_tensors_are_held(name):
    "A backend keeps its tensors alive until it has committed, though its kernels know only addresses"
    if name == 'numba':
        if device.type != 'cpu': pytest.skip('numba is for a CPU')
        make = pytest.importorskip('onecycle_prune.select.numba_backend').NumbaBackend
    else: make = triton.TritonBackend
    tensors = torch.ones(4, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    references = [weakref.ref(t) for t in tensors]
    found = make([problem([tensors[0]], [tensors[1]], 3)])
    del tensors
    assert all(r() is not None for r in references)
    found.commit()
    assert references[1]().tolist() == [True, True, True, False]


def test_autograd_sees_the_change():
    "Autograd notices that a tensor which a backward pass has saved has changed"
    w = nn.Parameter(torch.randn(4, 4, device=device))
    y = (w*w).sum()
    found = triton.TritonBackend([problem([w], [torch.zeros(4, 4, dtype=torch.bool, device=device)], 3)])
    with torch.no_grad(): found.commit()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.backward()


@pytest.mark.parametrize('fault, why', [
    (lambda *args: None, 'do not agree with a sort'), (lambda *args: 1/0, 'ZeroDivisionError')],
    ids=['wrong', 'broken'])
def test_not_trusted(fault, why, monkeypatch):
    "Kernels that err or do not run are not used, with a warning"
    monkeypatch.setattr(triton.TritonBackend, 'commit', fault)
    with pytest.warns(UserWarning, match=why): assert not triton.trusted.__wrapped__(device, torch.float32)


compiling = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from onecycle_prune.select import triton_backend as backend
types = dict(candidates='*i32', shift='i32', above='i32', INT='constexpr') # all others are addresses of int64
for f in (backend._find_candidates, backend._protect_best, backend._pick_digit, backend._refine_candidates,
          backend._count_tie_positions, backend._prune_candidates):
    for INT in (tl.int16, tl.int32, tl.int64) if 'INT' in f.arg_names else (None,):
        signature = {n: types.get(n, '*i64') for n in f.arg_names}
        source = ASTSource(f, signature=signature, constexprs={'INT': INT} if INT else {})
        for arch in (75, 80, 90):
            assert triton.compile(source, target=GPUTarget('cuda', arch, 32), options=dict(num_warps=8)).asm['cubin']
"""


def test_compiles():
    "For three generations of GPUs, without having one"
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    run = subprocess.run([sys.executable, '-c', compiling], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
