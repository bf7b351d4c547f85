"Properties of every training, for drawn networks, layouts and ways to prune, checked in the weights by reference.py."
import math
from typing import NamedTuple

import pytest, torch
from fastai.basics import Callback, DataLoader, DataLoaders
from hypothesis import assume, given, settings, strategies as st
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits
from networks import dtypes, tiny_data
from reference import (
    anatomy, axes, canonical, conv_axes, curve, group_scores, layers_of, param_layout, progress, zero_groups)

pytestmark = pytest.mark.filterwarnings('ignore:.*One group of each layer is kept')
few, some, many = (settings(max_examples=n, deadline=None) for n in (20, 120, 200))
fractions = st.floats(0, 1)


### What is drawn

@st.composite
def stacks(draw):
    "Linear layers"
    sizes = [144, *draw(st.lists(st.sampled_from([1, 3, 4, 8]), max_size=2)), 4]
    parts = [nn.Flatten()]
    for n_in, n_out in zip(sizes, sizes[1:]):
        parts.append(nn.Linear(n_in, n_out, bias=draw(st.booleans())))
        if draw(st.booleans()): parts.append(nn.BatchNorm1d(n_out))
        parts.append(nn.Tanh())
    return nn.Sequential(*parts[:-1])


@st.composite
def convnets(draw):
    "Convolutions, also grouped, depthwise and transposed, with or without bias and batch norm, and a linear head"
    n_in, parts = 4, []
    for _ in range(draw(st.integers(1, 3))):
        cls, n_out = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d])), draw(st.sampled_from([4, 8]))
        size = draw(st.sampled_from([(1, 1), (1, 3), (3, 3)]))
        n_groups = draw(st.sampled_from([1, 2, math.gcd(n_in, n_out)]))
        padding = size[0]//2, size[1]//2
        parts.append(cls(n_in, n_out, size, padding=padding, groups=n_groups, bias=draw(st.booleans())))
        if draw(st.booleans()): parts.append(nn.BatchNorm2d(n_out, affine=draw(st.booleans())))
        parts.append(nn.Tanh())
        n_in = n_out
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 4))


def reverse_axes_(net):
    "Store each parameter with its first axis as the fastest"
    for p in net.parameters():
        order = [*reversed(range(p.dim()))]
        p.data = p.data.permute(order).contiguous().permute(order)


def leave_gaps_(net):
    "Store each parameter as every other number of a longer one"
    for p in net.parameters(): p.data = torch.stack([p.data, p.data], -1)[..., 0]


layouts = dict(
    contiguous=lambda net: net,
    channels_last=lambda net: net.to(memory_format=torch.channels_last),
    reversed=reverse_axes_,
    with_gaps=leave_gaps_)


def can_have(m, granularity):
    "Whether the layer `m` has groups of this granularity"
    if granularity == '2:4': return canonical(m, m.weight).shape[1 if isinstance(m, nn.Linear) else 2] % 4 == 0
    return axes(m, granularity) is not None


class Case(NamedTuple):
    "A network, the names of the layers that are pruned, and how"
    net: nn.Module
    names: list
    granularity: str
    context: str
    def kwargs(self): return dict(granularity=self.granularity, context=self.context, layers=self.names)
    def max_sparsity(self): return .5 if self.granularity == '2:4' else 1.


@st.composite
def cases(draw, dtypes=dtypes):
    "A network, some of its layers, and how they are pruned"
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 99)))
        net = draw(stacks() | convnets()).to(draw(st.sampled_from(dtypes)))
    layouts[draw(st.sampled_from([*layouts]))](net)
    layers = layers_of(net)
    granularity = draw(st.sampled_from([g for g in conv_axes if any(can_have(m, g) for m in layers.values())]))
    candidates = [n for n, m in layers.items() if can_have(m, granularity)]
    names = draw(st.sets(st.sampled_from(candidates), min_size=1))
    return Case(net, [n for n in candidates if n in names], granularity, draw(st.sampled_from(['local', 'global'])))


# The sparsity after each batch, along a schedule or arbitrary.
curves = (st.builds(curve, st.sampled_from([*progress]), fractions, st.integers(1, 12))
          | st.lists(fractions, min_size=1, max_size=12))


@torch.no_grad()
def change_all_(net, gen, with_ties):
    "Give all tensors new values, none zero, few different ones `with_ties`; some tensors are far smaller than others"
    for t in net.state_dict().values():
        if not t.is_floating_point(): continue
        x = torch.randint(1, 4, t.shape, generator=gen)/2 if with_ties else torch.rand(t.shape, generator=gen) + .1
        t.copy_(x * (torch.randint(2, t.shape, generator=gen)*2 - 1) * 10.**-torch.randint(4, (), generator=gen))


### What is asserted

class Watch:
    "Compare a network after each pruning with what it was before: call `note` before, `check` after"
    def __init__(self, case):
        self.case, self.net = case, case.net
        self.anatomy, self.layout = anatomy(case.net), param_layout(case.net)
        self.pruned = {n: torch.zeros_like(zero_groups(m, case.granularity)) for n, m in self.layers.items()}
        self.n_pruned = {}  # of each pool, by its first layer

    @property
    def layers(self): return {n: layers_of(self.net)[n] for n in self.case.names}

    def note(self): self.before = bits(self.net)

    def check(self, sparsity, tolerance=0):
        "After a pruning to `sparsity`, which may differ from the schedule's by a rounding error of `tolerance`"
        pruned = {n: zero_groups(m, self.case.granularity) for n, m in self.layers.items()}
        for pool in [[n] for n in pruned] if self.case.context == 'local' else [[*pruned]]:
            self.check_pool(pool, pruned, sparsity, tolerance)
        if self.case.granularity == '2:4':
            for mask in pruned.values():
                assert (mask.movedim(-1 if mask.dim() == 2 else 2, -1).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
        assert_same(bits(self.net), self.expected(pruned))
        assert anatomy(self.net) == self.anatomy and param_layout(self.net) == self.layout
        self.pruned = pruned

    def check_pool(self, pool, pruned, sparsity, tolerance):
        "The count is exact, no layer collapses, and pruned groups stay pruned while the sparsity rises"
        n, n_pruned = sum(pruned[o].numel() for o in pool), sum(int(pruned[o].sum()) for o in pool)
        assert n_pruned in {min(round(sparsity*n + e), n-len(pool)) for e in (-tolerance, tolerance)}
        assert not any(pruned[o].all() for o in pool)
        rising = n_pruned >= self.n_pruned.get(pool[0], 0)
        fewer, more = (self.pruned, pruned) if rising else (pruned, self.pruned)
        assert not any((fewer[o] & ~more[o]).any() for o in pool)
        self.n_pruned[pool[0]] = n_pruned
        if self.case.granularity != '2:4': self.check_lowest(pool, pruned)

    def check_lowest(self, pool, pruned):
        "No newly pruned group scores higher than a kept one, except for the one that another layer has to keep"
        scores = {o: group_scores(self.layers[o], self.before[f'{o}.weight'], self.case.granularity) for o in pool}
        new = {o: scores[o][pruned[o] & ~self.pruned[o]] for o in pool}
        kept = {o: scores[o][~pruned[o]] for o in pool}
        bound = (1 + 1e-5) * min([s.min() for s in kept.values() if len(s) > 1], default=math.inf)
        for o in pool: assert not len(new[o]) or new[o].max() <= min(bound, (1 + 1e-5) * kept[o].min())

    def expected(self, pruned):
        "The state before, with zeros where it is pruned; with a filter, its bias and its batch norm are zero too"
        res = {k: v.clone() for k, v in self.before.items()}
        for n, m in self.layers.items():
            canonical(m, res[f'{n}.weight']).masked_fill_(pruned[n], 0)
            if self.case.granularity != 'filter': continue
            with_filter = [f'{n}.bias']
            if isinstance(bn := self.net[int(n)+1], nn.BatchNorm2d):
                with_filter += [f'{int(n)+1}.{o}' for o in (('weight', 'bias') if bn.affine else ('running_mean',))]
            for k in with_filter:
                if k in res: res[k].masked_fill_(pruned[n].flatten(), 0)
        return res

    def fraction(self):
        "The fraction of the groups that are pruned"
        masks = self.pruned.values()
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


### In a loop

def observed_sparsifier(case):
    "A sparsifier that has seen a forward pass, so that it knows the norms after filters"
    sp = Sparsifier(case.net, **case.kwargs())
    sp.first_forward.remove()
    sp.observe(case.net, (tiny_data(4)[0].to(next(case.net.parameters()).dtype),))
    return sp


@pytest.mark.slow
@many
@given(cases(), curves, st.integers(0, 99), st.booleans())
def test_loop(case, sparsities, seed, with_ties):
    "However the weights change between two prunings; `apply` zeroes what is pruned and nothing else"
    gen, watch = torch.Generator().manual_seed(seed), Watch(case)
    change_all_(case.net, gen, with_ties)
    sp = observed_sparsifier(case)
    for s in sparsities:
        s *= case.max_sparsity()
        change_all_(case.net, gen, with_ties)
        watch.note()
        fraction = sp.prune(s)
        watch.check(s)
        assert fraction == watch.fraction()
        assert_same(sp.masks, {n: m.weight != 0 for n, m in watch.layers.items()})
        change_all_(case.net, gen, with_ties)
        watch.note()
        sp.apply()
        assert_same(bits(case.net), watch.expected(watch.pruned))


@pytest.mark.slow
@some
@given(cases(), curves, st.integers(0, 99), st.booleans(), st.data())
def test_new_sparsifier(case, sparsities, seed, with_ties, data):
    "A new sparsifier in the middle of a loop continues as the old one would have"
    start, i_new = bits(case.net), data.draw(st.integers(0, len(sparsities)-1))
    def run(i_new):
        case.net.load_state_dict(start)
        gen, sp = torch.Generator().manual_seed(seed), observed_sparsifier(case)
        for i, s in enumerate(sparsities):
            if i == i_new: sp = observed_sparsifier(case)
            change_all_(case.net, gen, with_ties)
            sp.prune(s*case.max_sparsity())
            # A weight that was pruned and returned is zero until a step changes it.
            change_all_(case.net, gen, with_ties)
            sp.apply()
        return bits(case.net)
    assert_same(run(i_new), run(None))


### In a training with fastai

class Watching(Callback):
    "Call `watch.note` after the optimizer's step, before the pruning, and `watch.check` after the batch"
    order = SparsifyCallback.order - 1
    def __init__(self, watch, sparsities): self.watch, self.remaining = watch, list(sparsities)
    def before_batch(self):
        if self.training: self.watch.note()
    def after_step(self): self.watch.note()
    def after_batch(self):
        if self.training: self.watch.check(self.remaining.pop(0), tolerance=1e-9)


class WatchingStart(Callback):
    "Call `watch.check` after a pruning that comes before the first step"
    order = SparsifyCallback.order + 1
    def __init__(self, watch, sparsity): self.watch, self.sparsity = watch, sparsity
    def before_batch(self):
        if self.training and self.train_iter == 0: self.watch.check(self.sparsity, tolerance=1e-9)


@pytest.fixture
def fit(new_learner):
    "A function that trains a network for `n_epochs` of `n_batches` batches of two, and returns its learner"
    def _fit(net, n_batches, n_epochs, cbs):
        x, y = tiny_data()
        items = [*zip(x.to(next(net.parameters()).dtype), y)]
        learn = new_learner(net)
        learn.dls = DataLoaders(DataLoader(items[:2*n_batches], bs=2), DataLoader(items[-2:], bs=2))
        # fastai's running mean of the losses needs float32.
        learn.loss_func = lambda pred, y: nn.functional.cross_entropy(pred.float(), y)
        learn.fit(n_epochs, 1e-2, cbs=cbs)
        return learn
    return _fit


@pytest.mark.slow
def test_training(fit):
    "Counts, values and memory layout, after every batch"
    @some
    @given(cases([torch.float32, torch.float64]), st.sampled_from([*progress]), fractions,
        st.integers(1, 4), st.integers(1, 3))
    def holds(case, schedule, target, n_batches, n_epochs):
        if case.granularity == '2:4': target = .5
        watch = Watch(case)
        watching = Watching(watch, curve(schedule, target, n_batches*n_epochs))
        cb = SparsifyCallback(target, schedule=schedule, **case.kwargs())
        start = [WatchingStart(watch, target)]*(schedule == 'at_start')
        learn = fit(case.net, n_batches, n_epochs, [cb, watching, *start])
        assert not watching.remaining
        assert_same(learn.recorder.sparsities[-1], watch.fraction())
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
