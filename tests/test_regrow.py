"Weights that return: exact counts, what grows, the optimizer's state, and trainings that continue from a checkpoint."
import copy, math, weakref

import pytest, torch
from fastai.basics import Adam, Callback, CancelStepException, OptimWrapper
from fastai.callback.tracker import SaveModelCallback
from functools import partial
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.regrow import Exchange, Keep, Soft, exchange, forget, get_regrow, regrowths
from onecycle_prune.sparsifier import Sparsifier
from torch import nn, tensor

from helpers import assert_resumes, assert_same, bits
from networks import adam, line, momentum_sgd, n_weights, tiny_learner, tiny_net, total_weights
from reference import layers_of

often = dict(rigl=Exchange('gradient', every=1, context='erk', criteria='random', schedule='at_start'),
    set=Exchange('random', every=1, context='erk', criteria='random', schedule='at_start'),
    granet=Exchange('gradient', .5, every=1, schedule=regrowths['granet'].schedule))


class See(Callback):
    "After each batch: the masks of the callback, and the weights"
    order = SparsifyCallback.order + 1
    def __init__(self, cb): self.cb, self.masks, self.weights = cb, [], []
    def after_batch(self):
        if not self.training: return
        self.masks.append({n: ~m for n, m in self.cb.sparsifier.masks.items()})
        self.weights.append({n: m.weight.detach().clone() for n, m in layers_of(self.model).items()})


def trained(path, epochs=4, opt_func=momentum_sgd, **kwargs):
    cb = SparsifyCallback(.8, **kwargs)
    see, learn = See(cb), tiny_learner(path, opt_func=opt_func)
    learn.fit_one_cycle(epochs, 1e-2, cbs=[cb, see])
    return see, learn


def count(masks): return sum(int(o.sum()) for o in masks.values())


@pytest.mark.parametrize('name', ['rigl', 'set'])
@pytest.mark.parametrize('opt_func', [momentum_sgd, adam, partial(OptimWrapper, opt=torch.optim.AdamW)],
                         ids=['sgd', 'adam', 'AdamW'])
def test_sparse_from_the_start(name, opt_func, tmp_path):
    "The count of each layer is exact after each step, masks change until 75 %, and pruned weights are zero"
    see, _ = trained(tmp_path, opt_func=opt_func, regrow=often[name])
    per_layer = [[int(o.sum()) for o in masks.values()] for masks in see.masks]
    assert all(o == per_layer[0] for o in per_layer) and sum(per_layer[0]) == round(.8*total_weights)
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(see.masks, see.masks[1:])]
    assert all(changed[:10]) and not any(changed[13:])
    for masks, weights in zip(see.masks, see.weights):
        for n, mask in masks.items(): assert not weights[n][mask].any()


def test_gradual(tmp_path):
    "GraNet's count is that of the cubic schedule at its last exchange, and weights return"
    see, _ = trained(tmp_path, regrow='granet')
    assert [count(o) for o in see.masks] == [
        round(.8*total_weights*(1 - max(0, 1 - (i+1)/20/.75)**3)) for i in range(20)]
    returned = [sum(int((a[n] & ~b[n]).sum()) for n in a) for a, b in zip(see.masks, see.masks[1:])]
    assert sum(returned[:13]) > 0 and not any(returned[14:])


def test_steps_of_the_schedule():
    "A rising schedule stands still between exchanges, and after the last one it does not"
    method = Exchange(every=7, end=.75)
    assert [method.position(i, 400) for i in (6, 7, 13, 14)] == [0, 7/400, 7/400, 14/400]
    assert method.position(299, 400) == 294/400 and method.position(301, 400) == 301/400
    assert method.position(400, 400) == 1
    assert method.position(5, 80) == 4/80  # a training of 80 batches has 40 times to exchange


def test_names_of_papers():
    assert [*regrowths] == ['set', 'rigl', 'granet', 'soft']
    for name in ('set', 'rigl'):
        cb = SparsifyCallback(.9, regrow=name)
        assert (cb.context, cb.criteria) == ('erk', 'random') and cb.schedule(0) == 1
    cb = SparsifyCallback(.9, context='local', criteria='snip', schedule='agp', regrow='rigl')
    assert (cb.context, cb.criteria) == ('local', 'snip') and cb.schedule(.2) == 0
    assert "regrow=Exchange('gradient', 0.3, every=100, end=0.75)" in repr(cb)
    assert SparsifyCallback(.9).criteria == 'large_final' and 'regrow' not in repr(SparsifyCallback(.9))


class TestExchange:
    def exchanged(self, w, g, pruned, fraction, growth='gradient', **kwargs):
        m = line(*w)
        m.weight.grad = None if g is None else tensor([g])
        sp = Sparsifier(m)
        sp.prune(pruned)
        grown = exchange(sp, fraction, growth, **kwargs)
        return m.weight.tolist()[0], sp.masks[''][0].tolist(), {n: o[0].tolist() for n, o in grown.items()}

    def test_by_hand(self):
        "Of 4 weights that are left, 2 are dropped; 2 of the 6 others have the largest gradients"
        w, kept, grown = self.exchanged([9., -8, 2, 1, 0, 0, 0, 0], [0., 0, 0, 0, -5, 3, 4, 1], .5, .5)
        assert w == [9, -8, 0, 0, 0, 0, 0, 0]
        assert kept == [True, True, False, False, True, False, True, False]
        assert grown == {'': [False, False, False, False, True, False, True, False]}

    def test_dropped_and_grown(self):
        "A weight that is dropped and grows again keeps its value, and does not count as grown"
        w, kept, grown = self.exchanged([9., -8, 2, 1, 0, 0, 0, 0], [0., 0, 9, 0, -5, 3, 4, 1], .5, .5)
        assert w == [9, -8, 2, 0, 0, 0, 0, 0] and kept[:5] == [True, True, True, False, True]
        assert sum(grown['']) == 1 and grown[''][4]

    def test_ties(self):
        "Of equal gradients, the first grow"
        _, kept, _ = self.exchanged([9., 8, 0, 0, 0, 0], [0.]*6, 4/6, .5)
        assert kept == [True, True, False, False, False, False] or kept == [True, False, True, False, False, False]

    def test_random(self):
        "Any weight may grow"
        kept = []
        for seed in range(30):
            kept.append(self.exchanged([4., 3, 2, 1, 0, 0, 0, 0], None, .5, .5, 'random', seed=seed)[1])
            assert sum(kept[-1]) == 4 and kept[-1][:2] == [True, True]
        assert all(any(column) for column in zip(*kept))

    def test_random_numbers(self):
        "Growth has a seed of its own, so the training has the random numbers of another one"
        sp = Sparsifier(net := tiny_net())
        sp.prune(.5)
        state = torch.get_rng_state()
        grown = exchange(sp, .5, 'random')
        assert torch.equal(torch.get_rng_state(), state)
        assert sum(int(o.sum()) for o in grown.values()) > 100 and net[0].weight.count_nonzero() < 200

    @pytest.mark.parametrize('g', [None, [math.nan]*4])
    def test_without_a_gradient(self, g):
        "A layer without a gradient is left alone, and one with NaN is an error that changes nothing"
        if g is None: assert self.exchanged([2., 1, 0, 0], g, .5, .5) == ([2, 1, 0, 0], [True, True, False, False], {})
        else:
            with pytest.raises(ValueError, match="gradient of layer '' is NaN or infinite"):
                self.exchanged([2., 1, 0, 0], g, .5, .5)

    def test_nothing_to_exchange(self):
        assert self.exchanged([2., 1, 3, 4], [1.]*4, 0, .5)[1:] == ([True]*4, {})
        assert self.exchanged([2., 0, 0, 0], [1.]*4, .75, 1.)[1:] == ([True, False, False, False], {})


@pytest.mark.parametrize('make', [
    lambda p: Adam([p], .1), lambda p: torch.optim.Adam([p], .1),
    lambda p: OptimWrapper([p], opt=torch.optim.Adam, lr=.1)], ids=['fastai', 'PyTorch', 'wrapped'])
def test_forget(make):
    "The state of weights that return is zero, and that of others stays"
    w = nn.Parameter(torch.ones(4))
    w.grad = tensor([1., 2, 3, 4])
    opt = make(w)
    opt.step()
    state = getattr(opt, 'opt', opt).state[w]
    before = {k: v.clone() for k, v in state.items() if torch.is_tensor(v) and v.shape == w.shape}
    mask = tensor([True, False, True, False])
    forget(opt, {'': w}, {'': mask})
    assert len(before) == 2
    for k, v in before.items():
        assert v.all() and torch.equal(state[k], v.masked_fill(mask, 0))


def test_optimizer_forgets_in_training(tmp_path):
    "Momentum of a weight that returns begins at zero: before its next step it is zero there"
    cb, seen = SparsifyCallback(.8, regrow=often['rigl']), []
    class Look(Callback):
        order = SparsifyCallback.order + 1
        def before_step(self):
            now = {n: ~m for n, m in cb.sparsifier.masks.items()}
            if seen:
                for n, m in layers_of(self.model).items():
                    grown = seen[-1][n] & ~now[n]
                    if grown.any(): assert not self.opt.state[m.weight]['grad_avg'][grown].any()
            seen.append(now)
    learn = tiny_learner(tmp_path)
    masks = See(cb)
    learn.fit_one_cycle(3, 1e-2, cbs=[cb, Look(), masks])
    assert sum(int((a[n] & ~b[n]).sum()) for a, b in zip(masks.masks, masks.masks[1:]) for n in a) > 20


@pytest.mark.parametrize('name', [*often, 'soft'])
def test_resumes(name, tmp_path):
    "From each checkpoint, bit for bit, though zeros do not say which weights are pruned"
    assert_resumes(lambda: tiny_learner(tmp_path), regrow=often.get(name, name), sparsity=.8)
    assert sorted(o.name for o in (tmp_path/'models').glob('sparsity_masks_*')) == [
        f'sparsity_masks_{i}.pth' for i in range(1, 5)]


def test_missing_masks(tmp_path):
    "Without its masks a training does not continue, nor with those of another checkpoint"
    make = lambda: tiny_learner(tmp_path)
    save = SaveModelCallback(every_epoch=True, with_opt=True)
    make().fit_one_cycle(3, 1e-2, cbs=[SparsifyCallback(.8, regrow='granet'), save])
    (tmp_path/'models/sparsity_masks_1.pth').rename(tmp_path/'models/sparsity_masks_2.pth')
    def resume(start):
        learn = make().load(f'model_{start-1}', with_opt=True, weights_only=False)
        learn.fit_one_cycle(3, 1e-2, start_epoch=start, cbs=SparsifyCallback(.8, regrow='granet'))
    with pytest.raises(FileNotFoundError, match='sparsity_masks_1.pth, which is missing'): resume(1)
    with pytest.raises(ValueError, match='sparsity_masks_2.pth belongs to another checkpoint'): resume(2)


class TestSoft:
    def test_by_hand(self, tmp_path):
        "The steps of plain PyTorch: a sparse forward pass, a step of all weights, a choice among all"
        learn, net = tiny_learner(tmp_path), tiny_net()
        cb = SparsifyCallback(.8, context='local', schedule='lin', regrow='soft', bn_batches=0)
        see = See(cb)
        learn.fit(2, .1, cbs=[cb, see])
        opt = torch.optim.SGD(net.parameters(), .1, momentum=.9)
        values = {n: m.weight.detach().clone() for n, m in layers_of(net).items()}
        for i, (x, y) in enumerate([*learn.dls.train]*2):
            nn.functional.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for n, m in layers_of(net).items(): m.weight.copy_(values[n])
            opt.step()
            opt.zero_grad()
            for n, m in layers_of(net).items():
                values[n] = m.weight.detach().clone()
                order = values[n].abs().flatten().argsort(stable=True)
                m.weight.data.view(-1)[order[:round(.08*(i+1)*n_weights[n])]] = 0
                torch.testing.assert_close(see.weights[i][n], m.weight.detach(), rtol=1e-4, atol=1e-6)
        assert sum(int((a[n] & ~b[n]).sum()) for a, b in zip(see.masks, see.masks[1:]) for n in a) > 0

    def test_exact(self, tmp_path):
        see, learn = trained(tmp_path, regrow='soft')
        assert [count(o) for o in see.masks] == [round(.8*total_weights*o) for o in map(
            SparsifyCallback(.8).schedule, [(i+1)/20 for i in range(20)])]
        assert sum(int((m.weight == 0).sum()) for m in layers_of(learn.model).values()) == round(.8*total_weights)

    def test_no_copy_is_left(self, tmp_path):
        "After a training nothing holds the values of pruned weights"
        cb, held = SparsifyCallback(.8, regrow='soft'), []
        learn = tiny_learner(tmp_path)
        keep = Callback(after_train=lambda self: held.extend(map(weakref.ref, cb.method.values.values())))
        learn.fit(1, 1e-2, cbs=[cb, keep])
        assert len(held) == 3 and not any(o() is not None for o in held)

    @pytest.mark.parametrize('error', [CancelStepException, RuntimeError])
    def test_a_step_that_fails(self, error, tmp_path):
        "If a step is cancelled or fails, pruned weights are zero again"
        cb = SparsifyCallback(.8, schedule='at_start', regrow='soft')
        class Fail(Callback):
            order = SparsifyCallback.order + 1
            def before_step(self):
                assert sum(int((m.weight == 0).sum()) for m in layers_of(self.model).values()) < total_weights/10
                raise error('stop')
        learn = tiny_learner(tmp_path)
        if error is RuntimeError:
            with pytest.raises(RuntimeError): learn.fit(1, cbs=[cb, Fail()])
        else: learn.fit(1, cbs=[cb, Fail()])
        assert sum(int((m.weight == 0).sum()) for m in layers_of(learn.model).values()) == round(.8*total_weights)


@pytest.mark.parametrize('name', [*regrowths])
@pytest.mark.parametrize('kwargs', [dict(granularity='filter'), dict(granularity='2:4')], ids=str)
def test_single_weights_only(name, kwargs, tmp_path):
    learn = tiny_learner(tmp_path)
    before = bits(learn.model)
    sparsity = None if kwargs['granularity'] == '2:4' else .5
    with pytest.raises(ValueError, match='needs granularity=.weight|Granularity'):
        learn.fit(1, cbs=SparsifyCallback(sparsity, context='local', regrow=name, layers=nn.Conv2d, **kwargs))
    assert_same(bits(learn.model), before)


@pytest.mark.parametrize('word,right', [('rgl', "'rigl'"), ('dst', "'rigl'"), ('sft', "'soft'")])
def test_nearest(word, right):
    with pytest.raises(ValueError, match=f'Unknown regrow: {word!r}. Did you mean {right}.*Allowed: set, rigl, '):
        SparsifyCallback(.9, regrow=word)


@pytest.mark.parametrize('kwargs,message', [
    (dict(growth='gradients'), "Did you mean 'gradient'"), (dict(fraction=1.5), 'fraction is in .0, 1., got 1.5'),
    (dict(end=0), 'end is in'), (dict(every=0), 'every is 1 or more')])
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message): Exchange(**kwargs)


def test_default():
    "Without the argument nothing returns"
    assert type(get_regrow()) is Keep and get_regrow(Soft()).has_state
    cb = SparsifyCallback(.9)
    assert type(copy.copy(cb).regrow) is Keep
