"What holds of every training, whatever the network, its layout and the way it is pruned: groups are found anew from the weights."
import math
from typing import NamedTuple

import pytest, torch
from fastai.basics import Callback, DataLoader, DataLoaders
from hypothesis import assume, given, settings, strategies as st
from onecycle_prune.all import *
from torch import nn

from conftest import assert_same, bits, tiny_data
from test_training import anatomy, progress

pytestmark = pytest.mark.filterwarnings('ignore:.*One group of each layer is kept')
few, some, many = (settings(max_examples=n, deadline=None) for n in (20, 120, 200))
dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
fractions = st.floats(0, 1)

# the axes that one group spans: of a convolution as `canonical` sees it, and of a linear layer
conv_axes = {'weight': (), 'row': (4,), 'column': (3,), 'kernel': (3, 4), 'filter': (2, 3, 4), 'channel': (2,), '2:4': ()}
linear_axes = {'weight': (), 'row': (1,), 'column': (0,), '2:4': ()}


### Groups

def canonical(m, w):
    "A view of `w` with the axes of a convolution in one order, (group, out, in, height, width), transposed or not"
    if isinstance(m, nn.Linear): return w
    w = w.unflatten(0, (m.groups, -1))
    return w.transpose(1, 2) if m.transposed else w


def axes(m, granularity): return (linear_axes if isinstance(m, nn.Linear) else conv_axes).get(granularity)


def fits(m, granularity):
    if granularity == '2:4': return canonical(m, m.weight).shape[1 if isinstance(m, nn.Linear) else 2] % 4 == 0
    return axes(m, granularity) is not None


def silent(m, granularity):
    "Which groups are zero in every weight"
    alive, dims = canonical(m, m.weight) != 0, axes(m, granularity)
    return ~(alive.any(dims, keepdim=True) if dims else alive)


def scores(m, w, granularity):
    "The mean magnitude of each group of `w`"
    w, dims = canonical(m, w).abs().double(), axes(m, granularity)
    return w.mean(dims, keepdim=True) if dims else w


def layers(net): return {n: m for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}


### What is drawn

@st.composite
def stacks(draw):
    "Linear layers"
    sizes = [144, *draw(st.lists(st.sampled_from([1, 3, 4, 8]), max_size=2)), 4]
    parts = [nn.Flatten()]
    for n_in, n_out in zip(sizes, sizes[1:]):
        parts += [nn.Linear(n_in, n_out, bias=draw(st.booleans()))] + [nn.BatchNorm1d(n_out)]*draw(st.booleans()) + [nn.Tanh()]
    return nn.Sequential(*parts[:-1])


@st.composite
def convnets(draw):
    "Convolutions, grouped, depthwise and transposed ones too, with or without bias and batch norm, and a linear head"
    n_in, parts = 4, []
    for _ in range(draw(st.integers(1, 3))):
        cls, n_out = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d])), draw(st.sampled_from([4, 8]))
        size = draw(st.sampled_from([(1, 1), (1, 3), (3, 3)]))
        groups = draw(st.sampled_from([1, 2, math.gcd(n_in, n_out)]))
        parts.append(cls(n_in, n_out, size, padding=(size[0]//2, size[1]//2), groups=groups, bias=draw(st.booleans())))
        if draw(st.booleans()): parts.append(nn.BatchNorm2d(n_out, affine=draw(st.booleans())))
        parts.append(nn.Tanh())
        n_in = n_out
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 4))


def reverse_(net):
    "Store each parameter with its first axis the fastest"
    for p in net.parameters():
        axes = [*reversed(range(p.dim()))]
        p.data = p.data.permute(axes).contiguous().permute(axes)


def spread_(net):
    "Store each parameter as every other number of a longer one"
    for p in net.parameters(): p.data = torch.stack([p.data, p.data], -1)[..., 0]


layouts = dict(contiguous=lambda net: net, channels_last=lambda net: net.to(memory_format=torch.channels_last), reversed=reverse_, spread=spread_)


class Case(NamedTuple):
    net: nn.Module
    names: list
    granularity: str
    context: str
    def kwargs(self): return dict(granularity=self.granularity, context=self.context, layers=self.names)
    def part(self): return .5 if self.granularity == '2:4' else 1.  # more than that a pattern does not take


@st.composite
def cases(draw, dtypes=dtypes):
    "A network, which of its layers are pruned, and how"
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 99)))
        net = draw(stacks() | convnets()).to(draw(st.sampled_from(dtypes)))
    layouts[draw(st.sampled_from([*layouts]))](net)
    granularity = draw(st.sampled_from([g for g in conv_axes if any(fits(m, g) for m in layers(net).values())]))
    fitting = [n for n, m in layers(net).items() if fits(m, granularity)]
    names = draw(st.sets(st.sampled_from(fitting), min_size=1))
    return Case(net, [n for n in fitting if n in names], granularity, draw(st.sampled_from(['local', 'global'])))


def curve(schedule, target, n): return [progress[schedule]((i+1)/n)*target for i in range(n)]

curves = st.builds(curve, st.sampled_from([*progress]), fractions, st.integers(1, 12)) | st.lists(fractions, min_size=1, max_size=12)


### What is held

class Watch:
    "Holds each pruning against what was before it: `note` before, `check` after"
    def __init__(self, case):
        self.case, self.net, self.anatomy, self.place = case, case.net, anatomy(case.net), place(case.net)
        self.pruned, self.k = {n: torch.zeros_like(silent(m, case.granularity)) for n, m in self.chosen.items()}, {}

    @property
    def chosen(self): return {n: layers(self.net)[n] for n in self.case.names}

    def note(self): self.before = bits(self.net)

    def check(self, s, slack=0):
        "After a pruning to the fraction `s`, which may be a float's error beside that of the schedule"
        pruned = {n: silent(m, self.case.granularity) for n, m in self.chosen.items()}
        for pool in [[n] for n in pruned] if self.case.context == 'local' else [[*pruned]]: self.check_pool(pool, pruned, s, slack)
        if self.case.granularity == '2:4':
            for n, g in pruned.items(): assert (g.movedim(-1 if g.dim() == 2 else 2, -1).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
        assert_same(bits(self.net), self.expected(pruned))
        assert anatomy(self.net) == self.anatomy and place(self.net) == self.place
        self.pruned = pruned

    def check_pool(self, pool, pruned, s, slack):
        n, k = sum(pruned[o].numel() for o in pool), sum(int(pruned[o].sum()) for o in pool)
        assert k in {min(round(s*n + e), n-len(pool)) for e in (-slack, slack)}
        assert not any(pruned[o].all() for o in pool)
        fewer, more = (self.pruned, pruned) if k >= self.k.get(pool[0], 0) else (pruned, self.pruned)
        assert not any((fewer[o] & ~more[o]).any() for o in pool)
        self.k[pool[0]] = k
        if self.case.granularity != '2:4': self.check_lowest(pool, pruned)

    def check_lowest(self, pool, pruned):
        "What went is no larger than what stays of its layer, nor than what stays of others, but for the last of each"
        x = {o: scores(self.chosen[o], self.before[f'{o}.weight'], self.case.granularity) for o in pool}
        went, stays = {o: x[o][pruned[o] & ~self.pruned[o]] for o in pool}, {o: x[o][~pruned[o]] for o in pool}
        bound = (1 + 1e-5) * min([s.min() for s in stays.values() if len(s) > 1], default=math.inf)
        for o in pool: assert not len(went[o]) or went[o].max() <= min(bound, (1 + 1e-5) * stays[o].min())

    def expected(self, pruned):
        "What was before, zero where it is pruned; with a filter, its bias and its batch norm"
        res = {k: v.clone() for k, v in self.before.items()}
        for n, m in self.chosen.items():
            canonical(m, res[f'{n}.weight']).masked_fill_(pruned[n], 0)
            if self.case.granularity != 'filter': continue
            silenced = [f'{n}.bias']
            if isinstance(bn := self.net[int(n)+1], nn.BatchNorm2d):
                silenced += [f'{int(n)+1}.{o}' for o in (('weight', 'bias') if bn.affine else ('running_mean',))]
            for k in silenced:
                if k in res: res[k].masked_fill_(pruned[n].flatten(), 0)
        return res


def place(net): return [(id(p), p.data_ptr(), p.stride(), p.dtype, p.requires_grad) for p in net.parameters()] + [*net.state_dict()]


@torch.no_grad()
def shake_(net, gen, few):
    "New values for all that a network has, from a `few` or from many, in some tensors far smaller than in others; none of them is zero"
    for t in net.state_dict().values():
        if not t.is_floating_point(): continue
        x = torch.randint(1, 4, t.shape, generator=gen)/2 if few else torch.rand(t.shape, generator=gen) + .1
        t.copy_(x * (torch.randint(2, t.shape, generator=gen)*2 - 1) * 10.**-torch.randint(4, (), generator=gen))


### A loop of one's own

@many
@given(cases(), curves, st.integers(0, 99), st.booleans())
def test_loop(case, sparsities, seed, few):
    "However the weights change between two prunings; `apply` zeroes what is pruned and nothing else"
    gen, watch = torch.Generator().manual_seed(seed), Watch(case)
    shake_(case.net, gen, few)
    sp = Sparsifier(case.net, **case.kwargs())
    for s in sparsities:
        shake_(case.net, gen, few)
        watch.note()
        share = sp.prune(s := s*case.part())
        watch.check(s)
        assert share == sum(int(g.sum()) for g in watch.pruned.values()) / sum(g.numel() for g in watch.pruned.values())
        assert_same(sp.masks, {n: m.weight != 0 for n, m in watch.chosen.items()})
        shake_(case.net, gen, few)
        watch.note()
        sp.apply()
        assert_same(bits(case.net), watch.expected(watch.pruned))


@some
@given(cases(), curves, st.integers(0, 99), st.booleans(), st.data())
def test_begun_again(case, sparsities, seed, few, data):
    "A sparsifier that is made in the midst of a loop goes on as the one before it would have"
    start, again = bits(case.net), data.draw(st.integers(0, len(sparsities)-1))
    def run(again):
        case.net.load_state_dict(start)
        gen, sp = torch.Generator().manual_seed(seed), Sparsifier(case.net, **case.kwargs())
        for i, s in enumerate(sparsities):
            if i == again: sp = Sparsifier(case.net, **case.kwargs())
            shake_(case.net, gen, few)
            sp.prune(s*case.part())
            shake_(case.net, gen, few)  # what is zero because it went and came back has moved on
            sp.apply()
        return bits(case.net)
    assert_same(run(again), run(None))


### A training with fastai

class Watching(Callback):
    "Notes after the optimizer's step, ahead of the pruning, and checks when the batch is done"
    order = SparsifyCallback.order - 1
    def __init__(self, watch, sparsities): self.watch, self.left = watch, list(sparsities)
    def after_step(self): self.watch.note()
    def after_batch(self):
        if self.training: self.watch.check(self.left.pop(0), slack=1e-9)


@pytest.fixture
def fit(new_learner):
    "A function that trains the network of a case for epochs of `n` batches of two, and returns its learner"
    def _fit(net, n, n_epochs, cbs):
        x, y = tiny_data()
        items = [*zip(x.to(next(net.parameters()).dtype), y)]
        learn = new_learner(net)
        learn.dls = DataLoaders(DataLoader(items[:2*n], bs=2), DataLoader(items[-2:], bs=2))
        learn.loss_func = lambda pred, y: nn.functional.cross_entropy(pred.float(), y)  # fastai's running mean takes no other
        learn.fit(n_epochs, 1e-2, cbs=cbs)
        return learn
    return _fit


def test_training(fit):
    "Counts, values and places, after every batch"
    @some
    @given(cases([torch.float32, torch.float64]), st.sampled_from([*progress]), fractions, st.integers(1, 4), st.integers(1, 3))
    def holds(case, schedule, target, n_batches, n_epochs):
        if case.granularity == '2:4': target = .5
        watch = Watch(case)
        watching = Watching(watch, curve(schedule, target, n_batches*n_epochs))
        learn = fit(case.net, n_batches, n_epochs, [SparsifyCallback(target, schedule=schedule, **case.kwargs()), watching])
        assert not watching.left
        assert_same(learn.recorder.sparsities[-1], sum(int(g.sum()) for g in watch.pruned.values()) / sum(g.numel() for g in watch.pruned.values()))
    holds()


def test_zero_is_dense(fit):
    "A training to sparsity 0 is bit for bit the one without pruning"
    @few
    @given(cases([torch.float32, torch.float64]), st.integers(1, 4))
    def holds(case, n_batches):
        assume(case.granularity != '2:4')
        start = bits(case.net)
        def run(*cbs):
            case.net.load_state_dict(start)
            fit(case.net, n_batches, 2, cbs)
            return bits(case.net)
        assert_same(run(SparsifyCallback(0, **case.kwargs())), run())
    holds()
