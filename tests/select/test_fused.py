"Fused pruning gives the same as scoring, selecting and zeroing by a stable sort, in one or several threads."
import itertools, os, subprocess, sys

import pytest, torch
from fastai.torch_core import TensorBase
from hypothesis import given, settings, strategies as st
from onecycle_prune.criteria import Criteria, criteria, needs_gradient
from onecycle_prune.granularity import NM
from onecycle_prune.select import core
from onecycle_prune.select.bits import zero_
from onecycle_prune.select.core import Problem, select
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits
from networks import drawn_pool, dtypes, tiny_net
from reference import by_sort

kernels = pytest.importorskip('onecycle_prune.select.numba_kernels')
from onecycle_prune.select.numba_backend import NumbaBackend  # noqa: E402

quick = settings(max_examples=100, deadline=None)


@pytest.fixture(params=['one thread', 'several'])
def threads(request, monkeypatch):
    "One thread, or two"
    if request.param == 'several':
        if kernels._threads_owner() is None or kernels.numba.config.NUMBA_NUM_THREADS < 2:
            pytest.skip('numba has no threads to share here')
        monkeypatch.setattr(kernels, '_n_threads', lambda: 2)
    else: monkeypatch.setattr(kernels, '_n_threads', lambda: 1)


def problem(weights, pruned, k):
    return Problem(pruned, k, lambda: pytest.fail('scores are not needed'), weights=weights)


def check(pools):
    "The masks and the weights of pools, each (weights, pruned, k); returns which of them did not fall back"
    expected, w0 = [by_sort(*p) for p in pools], [[w.clone() for w in ws] for ws, *_ in pools]
    problems = [problem(*p) for p in pools]
    taken = [p for p in problems if NumbaBackend.supports(p)]
    found = NumbaBackend(taken) if taken else None
    before = [[m.clone() for m in pruned] for _, pruned, _ in pools]
    assert_same([m for _, pruned, _ in pools for m in pruned], [m for masks in before for m in masks])
    if found: found.commit()
    fallback = dict(zip(map(id, taken), found.fallback)) if found else {}
    solved = [not fallback.get(id(p), True) for p in problems]
    for (ws, pruned, _), masks, old, was, ok in zip(pools, expected, w0, before, solved):
        assert_same(pruned, masks if ok else was)
        if ok: assert_same(ws, [torch.where(m, 0, w) for w, m in zip(old, masks)])
    return solved


def out_of_the_ordinary(weights, pruned, k):
    "Whether weights return or a layer may collapse, as far as ties show it"
    if k < sum(int(m.sum()) for m in pruned): return True
    new = [r & ~m for m, r in zip(pruned, by_sort(weights, pruned, k))]
    threshold = max((w.abs()[r].max() for w, r in zip(weights, new) if r.any()), default=None)
    return (len(pruned) > 1 and threshold is not None
            and any((m | (w.abs() <= threshold)).all() and not m.all() for w, m in zip(weights, pruned)))


@pytest.mark.usefixtures('threads')
def test_every_k():
    "Every k of one pool, next to others; only what is out of the ordinary falls back"
    @quick
    @given(st.lists(drawn_pool(), min_size=1, max_size=3), st.data())
    def holds(many, data):
        (weights, pruned), *others = [o for o in many if o[0][0].dtype == many[0][0][0].dtype]
        others = [(*o, data.draw(st.integers(0, sum(map(len, o[1]))))) for o in others]
        for k in range(sum(map(len, pruned))+1):
            pools = [(weights, pruned, k), *others]
            now = [([w.clone() for w in ws], [m.clone() for m in ms], n) for ws, ms, n in pools]
            expected = [(not out_of_the_ordinary(*o), any(m.all() for m in o[1])) for o in now]
            assert all(s == e or whole for s, (e, whole) in zip(check(now), expected, strict=True))
    holds()


# Weights, of which the first 16 of each 4096 are the sample. It is typical, far too high, or far too low.
big = torch.randn(3, 2**16, generator=torch.Generator().manual_seed(0))
sampled = torch.arange(2**16) % 4096 < 16
samples = dict(typical=big, high=big + 100*sampled, low=torch.where(sampled, .21, big), ties=(4*big).round(),
    equal=torch.ones_like(big))


@pytest.mark.parametrize('name', samples)
@pytest.mark.parametrize('n_pools', [1, 3])
@pytest.mark.usefixtures('threads')
def test_sample(name, n_pools, monkeypatch):
    "What a sample says of the weights may be wrong, and the masks are right"
    n_sure, find = [], NumbaBackend._open_all
    monkeypatch.setattr(NumbaBackend, '_open_all',
        lambda self, pools: n_sure.append(self.n_sure.copy()) or find(self, pools))
    layers = [w.clone() for w in samples[name]]
    masks = [w.abs() < .2 for w in layers]
    parts = [slice(None)] if n_pools == 1 else [slice(i, i+1) for i in range(3)]
    pools, more = [(layers[o], masks[o]) for o in parts], 20_000//n_pools
    solved = check([(ws, ms, sum(int(m.sum()) for m in ms) + more) for ws, ms in pools])
    # A layer may collapse if all its weights have the threshold.
    assert all(solved) == (name != 'equal' or n_pools == 3)
    assert (n_sure[0] > 0).all() and (n_sure[0] > more).any() == (name in ('high', 'ties', 'equal'))


@pytest.mark.parametrize('n', [15, 63, 64, 65, 96, 100])
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.usefixtures('threads')
def test_many_small(n, ties):
    "A large pool of small layers, whose last weights fill no vector: some of them are surely pruned"
    for k in range(0, 100*n, 37*n//10):
        layers = list(torch.randn(100, n, generator=torch.Generator().manual_seed(k)))
        if ties: layers = [(8*w).round() for w in layers]
        masks = [w.abs() < .1 for w in layers]
        pool = layers, masks, max(k, sum(int(m.sum()) for m in masks))
        expected = not out_of_the_ordinary(*pool)
        assert check([pool]) == [expected]


@pytest.mark.parametrize('dtype', dtypes, ids=str)
@pytest.mark.usefixtures('threads')
def test_big(dtype):
    "Several blocks, with the sample in use, from nothing pruned to nearly all"
    g = torch.Generator().manual_seed(0)
    def layers(*sizes):
        weights = [torch.randn(n, generator=g).to(dtype) for n in sizes]
        return weights, [torch.zeros(n, dtype=torch.bool) for n in sizes]
    n = kernels.block_size
    shared, single = layers(2*n+1, 900, n, 20_000), layers(n+1030)
    for s in (0, .001, .002, .002, .3, .3, .95):
        assert all(check([(*o, round(s*sum(map(len, o[0])))) for o in (shared, single)]))
        for w in shared[0]+single[0]: w.add_(torch.randn(w.shape, generator=g).to(dtype) * .01)


#: {formula: the scores of weights `w` and the other tensor `o`, in the operations of torch}
scores = {'|w|': lambda w, o: w.abs(), '-|w|': lambda w, o: -w.abs(), 'o': lambda w, o: o,
    '|w-o|': lambda w, o: (w-o).abs(), '|w*o|': lambda w, o: (w*o).abs(),
    'min(|w|,|o|)': lambda w, o: torch.minimum(w.abs(), o.abs()), '|w|-|o|': lambda w, o: w.abs() - o.abs(),
    '|w*(w-o)|': lambda w, o: (w*(w-o)).abs()}


def allowed_by_run(x, pruned, m, n_allowed):
    "Of each `m` neighbours along axis 1, those that come first: pruned ones, then the lowest scores, ties by index"
    keys = x.double().masked_fill(pruned, -torch.inf).movedim(1, -1)
    res = torch.zeros(keys.shape, dtype=torch.bool)
    for i in itertools.product(*map(range, keys.shape[:-1])):
        for start in range(0, keys.shape[-1], m):
            run = keys[i][start:start+m].tolist()
            res[i][[start + j for j in sorted(range(m), key=lambda j: (run[j], j))[:n_allowed]]] = True
    return res.movedim(-1, 1)


def check_scores(formula, weights, others, pruned, k, run=(0, 0)):
    "The masks and the weights of a pool whose scores a formula gives"
    found = [scores[formula](w, o) for w, o in zip(weights, others)]
    if run[0]: found = [x.masked_fill(~allowed_by_run(x, g, *run), torch.inf) for x, g in zip(found, pruned)]
    keys = torch.cat([x.double().masked_fill(g, -torch.inf).flatten() for x, g in zip(found, pruned)])
    mask = torch.zeros_like(keys, dtype=torch.bool)
    mask[keys.argsort(stable=True)[:k]] = True
    masks = [x.view(g.shape) for x, g in zip(mask.split([g.numel() for g in pruned]), pruned)]
    expected = [w.masked_fill(x, 0) for w, x in zip(weights, masks)]
    strides = [w.stride(1) for w in weights] if run[0] else None
    taken = Problem(pruned, k, lambda: pytest.fail('scores are not needed'), weights, formula=formula, others=others,
        run=run, strides=strides)
    assert NumbaBackend.supports(taken)
    backend = NumbaBackend([taken])
    backend.commit()
    if backend.fallback[0]: return False
    assert_same(pruned, masks)
    assert_same(weights, expected)
    return True


def test_all_formulas(): assert list(scores) == list(kernels.formulas)


# A criterion that scores before the training has its test in test_at_init.
with_formula = sorted(n for n, c in criteria.items() if hasattr(c, 'formula') and not hasattr(c, 'score'))


@pytest.mark.parametrize('granularity', ['weight', '2:4'])
@pytest.mark.parametrize('name', with_formula)
def test_same_as_called(name, granularity):
    "A criterion without its formula is called in each step, and prunes the same weights to the same numbers"
    fused = criteria[name]
    called = Criteria(fused.f, fused.memory) if isinstance(fused, Criteria) else lambda m: fused(m)
    if hasattr(fused, 'needs_gradient'): needs_gradient(called)
    assert fused.formula in scores and not hasattr(called, 'formula')
    nets, sps = [], []
    for criterion in (fused, called):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 12)))
        sps.append(Sparsifier(nets[-1], granularity, criteria=criterion))
    for s in (0, .1, .2, .2, .45, .3, .5):
        for net, sp in zip(nets, sps):
            torch.manual_seed(int(100*s))
            for p in net.parameters():
                p.data += torch.randn_like(p)*.01
                p.grad = torch.randn_like(p)
            sp.prune(s)
        assert_same(*map(bits, nets))


@pytest.mark.parametrize('formula', scores)
@pytest.mark.usefixtures('threads')
class TestFormulas:
    "Scores that the kernels compute are those of torch, bit for bit, so no mask differs"
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
    def test_random(self, formula, dtype):
        g = torch.Generator().manual_seed(0)
        sizes = 2*kernels.block_size+70, 900, 17
        weights, others = ([torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(2))
        pruned = [torch.zeros(n, dtype=torch.bool) for n in sizes]
        for s in (.001, .002, .002, .3, .7):
            assert check_scores(formula, weights, others, pruned, round(s*sum(sizes)))
            for t in weights: t.add_(torch.randn(t.shape, generator=g).to(dtype) * .01)

    def test_ties(self, formula):
        @quick
        @given(st.lists(st.tuples(*[st.sampled_from([-2., -1., -.5, -0., 0., .5, 1.])]*2, st.booleans()),
            min_size=1, max_size=150))
        def holds(drawn):
            for k in range(sum(o[2] for o in drawn), len(drawn)+1, 7):
                w, o, pruned = (torch.tensor(x) for x in zip(*drawn))
                assert check_scores(formula, [w], [o], [pruned], k)
        holds()

    @pytest.mark.parametrize('run', [(4, 2), (4, 3), (8, 4), (16, 8), (3, 1), (27, 9), (128, 64)], ids=str)
    @pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels last'])
    def test_runs(self, formula, run, last):
        "n:m patterns along the channels, whatever lies between them in memory"
        g = torch.Generator().manual_seed(0)
        shapes = [(6, 2*run[0], 3, 3), (3, 8*run[0], 1, 1), (2, 5*run[0], 2, 7), (40, run[0], 1, 1)]
        def tensors():
            ts = [torch.randn(o, generator=g) for o in shapes]
            if not last: return [t.mul_(4).round_().div_(4) for t in ts]  # with ties
            return [t.contiguous(memory_format=torch.channels_last) for t in ts]
        weights, others = tensors(), tensors()
        pruned = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
        most = sum(w.numel() for w in weights)*run[1]//run[0]
        for s in (.1, .11, .5, .9, 1):
            assert check_scores(formula, weights, others, pruned, round(s*most), run)
            for t in weights: t.add_(torch.randn(shapes[0], generator=g).flatten()[0] * .01)

    def test_many_blocks(self, formula):
        "Blocks end between runs, whose length is no divisor of a block's"
        g = torch.Generator().manual_seed(0)
        weights, others = ([torch.randn(2*kernels.block_size//27 + 9, 3, 3, 3, generator=g)] for _ in range(2))
        pruned = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
        for s in (.1, .6):
            assert check_scores(formula, weights, others, pruned, round(s*weights[0].numel()), (3, 2))
            for t in weights: t.add_(torch.randn(t.shape, generator=g) * .01)

    def test_not_finite(self, formula):
        "A score that is not finite falls back; also one that a pattern keeps"
        for value in (torch.nan, torch.inf, -torch.inf):
            if formula.startswith('min') and value == value: continue  # the smaller one is finite
            w, o = torch.arange(1., 17).view(1, 16), torch.full((1, 16), 3.)
            (o if formula == 'o' else w)[0, 3] = value
            for run in ((0, 0), (4, 2)):
                args = [w.clone()], [o], [torch.zeros(1, 16, dtype=torch.bool)], 2, run
                assert not check_scores(formula, *args)

    def test_not_finite_in_full_run(self, formula):
        "In the middle of a layer, where vectors are compared, and in a run of which all allowed weights are pruned"
        w, o = torch.arange(1., 257).view(1, 256), torch.full((1, 256), 3.)
        pruned = torch.zeros(1, 256, dtype=torch.bool)
        pruned[0, 128:130] = True
        assert check_scores(formula, [w.clone()], [o], [pruned.clone()], 4, (4, 2))
        if formula.startswith('min'): o[0, 131] = torch.inf
        (o if formula == 'o' else w)[0, 131] = torch.inf
        assert not check_scores(formula, [w.clone()], [o], [pruned.clone()], 4, (4, 2))


def test_runs_without_blocks():
    "Runs that are too long, or that no block of a large layer ends with, are left to the next backend"
    for shape, m in (((1, 129, 3, 3), 129), ((60, 27, 7, 7), 27)):
        w, g = torch.randn(shape), NM(f'{m//3}:{m}')
        assert w.numel() > kernels.block_size or m > kernels.longest_run
        layer = nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
        layer.weight = nn.Parameter(w)
        sp = Sparsifier(layer, g)
        problem = sp._problem(sp.pools[0], w.numel()//3, list(sp.layers))
        assert problem.run[0] == m and not NumbaBackend.supports(problem)
        sp.prune(1/3)
        allowed = allowed_by_run(w.abs(), torch.zeros_like(w, dtype=torch.bool), m, m - m//3)
        keys = w.abs().masked_fill(~allowed, torch.inf).flatten()
        expected = torch.zeros_like(keys, dtype=torch.bool)
        expected[keys.argsort(stable=True)[:round(w.numel()/3)]] = True
        assert_same(~sp.masks[''], expected.view(shape))


def test_half_precision():
    "Torch rounds a difference of half precision in a way of its own, so it is left to torch"
    w, pruned = torch.rand(4, 8).half(), torch.zeros(4, 8, dtype=torch.bool)
    def supported(formula): return NumbaBackend.supports(Problem([pruned], 3, None, [w], formula=formula, others=[w]))
    assert [f for f in scores if supported(f)] == ['|w|', '-|w|']


def test_others():
    "Not fused: another tensor that is missing, or lies in memory in another way"
    w, pruned = torch.rand(4, 5, 6, 6), torch.zeros(4, 5, 6, 6, dtype=torch.bool)
    for o in (None, w.to(memory_format=torch.channels_last), w.double()):
        assert not Problem([pruned], 3, None, [w], formula='|w*o|', others=[o]).fusable
    assert Problem([pruned], 3, None, [w], formula='|w*o|', others=[w]).fusable


@pytest.mark.usefixtures('threads')
def test_ties():
    "Ties are pruned by index across blocks and layers, even if the sample sees nothing else"
    n = kernels.block_size
    sizes = 2*n, n//2, n
    weights = [torch.ones(2*n), torch.full((n//2,), -1.), torch.ones(n)]
    pruned = [torch.zeros(i, dtype=torch.bool) for i in sizes]
    pruned[0][5:n:3] = True
    weights[2][::1000] = .5
    for w in weights: w[-1] = 9  # no layer collapses
    k = sum(int(m.sum()) for m in pruned)
    for n_prune in (1, 70, n//3, n): assert check([(weights, [m.clone() for m in pruned], k+n_prune)]) == [True]


def test_fork():
    "A forked process has none of its parent's threads, and works without them"
    if not hasattr(os, 'fork') or kernels._threads_owner() is None: pytest.skip('no threads stay behind')
    pid = os.fork()
    if not pid:
        right = check([([torch.arange(9.)], [torch.zeros(9, dtype=torch.bool)], 4)]) == [True]
        os._exit(3 if right and kernels._n_threads() == 1 else 4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


@pytest.mark.parametrize('n', [1, 2, 3])
def test_threads_of_torch(n):
    "Torch keeps its number of threads when numba's are started"
    code = f"""
import torch
torch.set_num_threads({n})
from onecycle_prune.select import numba_kernels
numba_kernels._threads_owner()
assert torch.get_num_threads() == {n}"""
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, timeout=60)


def test_number_of_threads(monkeypatch):
    "As many as torch has, but no more than numba's, and one if the threading layer is not safe"
    monkeypatch.setattr(kernels, '_threads_owner', os.getpid)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 64)
    assert kernels._n_threads() == kernels.numba.config.NUMBA_NUM_THREADS
    monkeypatch.setattr(kernels, '_threads_owner', lambda: None)
    assert kernels._n_threads() == 1


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures('threads')
def test_not_finite(value):
    "A weight that is not finite falls back if it is kept, and is zeroed if it is pruned; other pools are solved"
    w, pruned = torch.arange(1., 9), torch.zeros(8, dtype=torch.bool)
    w[3] = value
    sound = [torch.arange(1., 9)], [torch.zeros(8, dtype=torch.bool)], 5
    assert check([([w], [pruned], 2), sound]) == [False, True]
    pruned[3] = True
    assert check([([w], [pruned], 3)]) == [True] and w[3] == 0


@pytest.mark.usefixtures('threads')
def test_large_weights():
    "Weights whose exponents together have all the bits of infinity are still finite"
    assert check([([torch.tensor([1.5, 2.5, -3., 1.])], [torch.zeros(4, dtype=torch.bool)], 2)]) == [True]


@pytest.mark.parametrize('shape,layout', [
    ((8, 6, 3, 3), torch.channels_last), ((8, 6, 3, 3, 3), torch.channels_last_3d)], ids=['2d', '3d'])
@pytest.mark.usefixtures('threads')
def test_channels_last(shape, layout):
    "Ties are broken by index. So a pool of which only some ties are pruned is left to the next backend"
    def last(t): return t.to(memory_format=layout)
    g = torch.Generator().manual_seed(0)
    w, pruned = torch.randn(shape, generator=g), torch.rand(shape, generator=g) < .3
    n = int(pruned.sum())
    plain = [torch.randn(50, generator=g)], [torch.zeros(50, dtype=torch.bool)], 7
    assert check([([last(w)], [last(pruned)], n+20), plain]) == [True, True]
    w.fill_(1).flatten()[::2] = .5
    halves = int(((w == .5) & ~pruned).sum())
    assert check([([last(w)], [last(pruned)], n+20), plain]) == [False, True]
    assert check([([last(w)], [last(pruned)], n+halves)]) == [True]  # all ties are pruned


def test_fusable():
    "Not fused: weights that return, of another layout than their mask, of two precisions, empty, or of a subclass"
    w, pruned = torch.rand(4, 5, 6, 6), torch.zeros(4, 5, 6, 6, dtype=torch.bool)
    def fusable(weights, masks, k): return problem(weights, masks, k).fusable
    assert fusable([w], [pruned], 3)
    assert not fusable([w.to(memory_format=torch.channels_last)], [pruned], 3)
    assert not fusable([w[:, ::2]], [pruned[:, ::2]], 3)
    assert not fusable([w, w.double()], [pruned, pruned], 3)
    assert not fusable([w], [torch.ones_like(pruned)], 3)
    assert not fusable([w[:0]], [pruned[:0]], 0)
    assert not fusable([w.as_subclass(TensorBase)], [pruned], 3)
    assert not Problem([pruned], 3, lambda: [w]).fusable


class TestSelect:
    "What `select` does with problems of different kinds"
    def parts(self, problems):
        "The classes of the backends that `select` chooses, with the numbers of their problems"
        selection = select(problems)
        selection.commit()
        assert all(sum(int(m.sum()) for m in p.pruned) == p.k for p in problems)
        return [(type(part).__name__, len(part.fallback)) for part in selection.parts]

    def fused(self, dtype=torch.float32, k=3):
        w = torch.randn(8).to(dtype)
        return Problem([torch.zeros(8, dtype=torch.bool)], k, lambda: [w.abs()], weights=[w])

    def test_two_precisions(self):
        "Each precision has its own fused pass"
        problems = [self.fused(), self.fused(torch.float64), self.fused()]
        assert self.parts(problems) == [('NumbaBackend', 2), ('NumbaBackend', 1)]

    def test_scores_only(self):
        "Numpy takes a problem without weights"
        scores = Problem([torch.zeros(8, dtype=torch.bool)], 3, lambda: [torch.randn(8)])
        assert sorted(self.parts([scores, self.fused()])) == [('NumbaBackend', 1), ('NumpyBackend', 1)]

    def test_fallback(self):
        "A layer that would collapse is left to numpy, which protects it"
        ws = [torch.tensor([.1, .2]), torch.tensor([1., 2., 3.])]
        masks = [torch.zeros(len(w), dtype=torch.bool) for w in ws]
        assert self.parts([Problem(masks, 3, lambda: [w.abs() for w in ws], weights=ws), self.fused()]) == [
            ('NumbaBackend', 2), ('NumpyBackend', 1)]
        assert_same(ws, [torch.tensor([0., .2]), torch.tensor([0., 0., 3.])])

    def test_returning(self):
        "Weights that return are scored by numpy"
        w = torch.tensor([1., 0., 0., 2.])
        assert self.parts([Problem([w == 0], 1, lambda: [w.abs()], weights=[w])]) == [('NumpyBackend', 1)]

    def test_without_numba(self, monkeypatch):
        "The same masks without numba"
        torch.manual_seed(0)
        w = torch.randn(1000)
        masks = []
        for backend in (NumbaBackend, None):
            found = [backend] if backend else []
            monkeypatch.setattr(core, '_fused_backends', lambda device, dtype, found=found: found)
            core.backends.cache_clear()
            masks.append(torch.zeros(1000, dtype=torch.bool))
            parts = self.parts([Problem([masks[-1]], 700, lambda: [w.abs()], weights=[w.clone()])])
            assert parts == [('NumbaBackend' if backend else 'NumpyBackend', 1)]
        core.backends.cache_clear()
        assert_same(*masks)

    def test_error_changes_nothing(self):
        "If one problem has no scores, no mask of the others has changed"
        def fail(): raise ValueError('no scores')
        fused, failing = self.fused(), Problem([torch.zeros(8, dtype=torch.bool)], 3, fail)
        with pytest.raises(ValueError, match='no scores'): select([fused, failing])
        assert not fused.pruned[0].any() and fused.weights[0].all()


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.usefixtures('threads')
def test_same_as_scored(context):
    "A criterion of the user with the scores of `large_final` takes the other way, to the same weights"
    nets = [tiny_net(), tiny_net()]
    criteria = 'large_final', lambda m: m.weight.abs()
    sps = [Sparsifier(net, context=context, criteria=c) for net, c in zip(nets, criteria)]
    for s in (0, .3, .3, .8, .99, .5, .9, 0, .2):
        for net, sp in zip(nets, sps):
            sp.prune(s)
            torch.manual_seed(int(100*s))
            with torch.no_grad():
                for p in net.parameters(): p.add_(torch.randn_like(p)*.01)
        assert_same(*map(bits, nets))
        assert_same(*(sp.masks for sp in sps))


def test_nothing_pruned_nothing_touched():
    "Before pruning begins no weight is written"
    net = tiny_net()
    sp, before = Sparsifier(net), [p._version for p in net.parameters()]
    for _ in range(2): sp.prune(0)
    assert before == [p._version for p in net.parameters()]
    sp.prune(.5)
    assert before != [p._version for p in net.parameters()]


@pytest.mark.parametrize('shape', [(3, 1), (1, 4), (3, 4), ()])
def test_zero_broadcasts(shape):
    "A mask of groups is broadcast to the weights"
    t = torch.randn(3, 4)
    pruned = torch.ones(shape, dtype=torch.bool)
    pruned.view(-1)[1:2] = False
    expected = t.masked_fill(pruned, 0)
    zero_(t, pruned)
    assert torch.equal(t, expected)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('context', ['local', 'global'])
def test_fast_path(monkeypatch, context, layout):
    "All layers of an ordinary model take the fast path, in channels-last too, except grouped convolutions there"
    torch.manual_seed(0)
    groups = 4 if layout == torch.contiguous_format else 1
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 16, 1), nn.Linear(16, 4))
    net = net.to(memory_format=layout)
    for m in net: nn.init.normal_(m.weight)  # alike, so that no layer would collapse
    sp = Sparsifier(net, context=context)
    monkeypatch.setattr(sp, '_scores', lambda name: pytest.fail('not on the fast path'))
    for s in (.1, .5, .9): sp.prune(s)
    sizes = [m.numel() for m in sp.masks.values()]
    n_pruned = sum(int((~m).sum()) for m in sp.masks.values())
    assert n_pruned == (round(.9*sum(sizes)) if context == 'global' else sum(round(.9*n) for n in sizes))


@pytest.mark.gpu
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_gpu(context, granularity):
    "The masks of a CPU, and the host never waits after the first batch"
    nets = [tiny_net(), tiny_net().cuda().to(memory_format=torch.channels_last)]
    cpu, gpu = (Sparsifier(net, granularity, context, layers=nn.Conv2d) for net in nets)
    for sp in (cpu, gpu): sp.prune(.1)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for s in (.1, .2, .5, .9, .3): gpu.prune(s)
    finally: torch.cuda.set_sync_debug_mode('default')
    for s in (.1, .2, .5, .9, .3): cpu.prune(s)
    assert_same(cpu.masks, {n: m.cpu() for n, m in gpu.masks.items()})
