"Which steps choose what is pruned: batches without a step, equal scores, and layers without a gradient."
import warnings

import pytest, torch
from fastai.basics import (Adam, Callback, CancelBackwardException, CancelBatchException, CancelStepException,
    OptimWrapper)
from fastai.callback.all import GradientAccumulation
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.criteria import Criteria, needs_gradient
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import Probe, assert_same
from networks import momentum_sgd, n_weights, tiny_net, total_weights
from reference import n_zeros, total_zeros, zero_masks


def messages(f, *args, **kwargs):
    "The warnings of a call"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(w.message) for w in caught]


class TestWithoutStep:
    "Batches without a step"

    @pytest.mark.parametrize('criteria', ['updating_movement', 'taylor', 'movement', 'large_final'])
    @pytest.mark.parametrize('n_acc', [16, 32])
    def test_accumulation(self, new_learner, criteria, n_acc):
        "No layer loses most of its weights by ties, and the target holds at the end"
        learn = new_learner()
        said = messages(learn.fit, 4, 1e-2, cbs=[SparsifyCallback(.5, criteria=criteria), GradientAccumulation(n_acc)])
        assert total_zeros(learn.model) == round(.5*total_weights)
        assert n_zeros(learn.model)['0'] < .9*n_weights['0'] and n_zeros(learn.model)['8'] > .1*n_weights['8']
        assert not any('same score' in o for o in said)

    @pytest.mark.parametrize('criteria', ['updating_movement', 'taylor', 'movement', 'large_final'])
    @pytest.mark.parametrize('event,ex', [('before_backward', CancelBatchException),
        ('after_backward', CancelBatchException), ('before_step', CancelBatchException),
        ('before_step', CancelStepException)])
    def test_cancelled(self, new_learner, criteria, event, ex):
        "A batch that does not step changes no mask"
        learn, probe = new_learner(opt_func=Adam), Probe(zero_masks)
        def cancel(self):
            if self.iter == 2: raise ex
        learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5, criteria=criteria), Callback(**{event: cancel}), probe])
        for i in (2, 7): assert_same(probe.seen[i], probe.seen[i-1])
        assert total_zeros(learn.model) == round(.5*total_weights)

    def test_memory_waits(self, new_learner):
        "What a criterion remembers of the last step is not touched by a batch without a step"
        learn, seen = new_learner(), []
        def skip(self):
            if self.iter % 2: raise CancelStepException
        def note(self): seen.append({n: t.clone() for n, t in self.learn.sparsify.sparsifier.memory.items()})
        late = Callback(after_batch=lambda self: note(self) if self.training else None)
        late.order = SparsifyCallback.order + 1
        learn.fit(1, 1e-2, cbs=[SparsifyCallback(.5, criteria='updating_movement'), Callback(before_step=skip), late])
        assert_same(seen[1], seen[0])
        assert not torch.equal(seen[2]['3'], seen[1]['3'])

    def test_the_rest_is_the_smallest(self, new_learner):
        "If no step follows, the rest is ranked by magnitude, since nothing moved"
        learn, before = new_learner(), {}
        def skip(self):
            if self.iter > 1: raise CancelStepException
        def note(self):
            if not self.training or self.iter != 2: return
            before.update({n: self.model[int(n)].weight.detach().clone() for n in n_weights})
        cbs = [SparsifyCallback(.5, criteria='updating_movement', schedule='lin'), Callback(before_step=skip),
               Callback(before_batch=note)]
        learn.fit(1, 1e-2, cbs=cbs)
        w = torch.cat([o.flatten() for o in before.values()])
        pruned = w == 0
        expected = pruned.clone()
        expected[w.abs().masked_fill(pruned, torch.inf).argsort()[:round(.5*total_weights) - int(pruned.sum())]] = True
        ends = torch.cat([learn.model[int(n)].weight.flatten() == 0 for n in n_weights])
        assert 0 < pruned.sum() < .3*total_weights and torch.equal(ends, expected)

    def test_curve_has_each_batch(self, new_learner):
        "`recorder.sparsities` has one value a batch: the sparsity that holds then"
        learn, probe = new_learner(), Probe(total_zeros)
        learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5), GradientAccumulation(16), probe])
        assert len(learn.recorder.sparsities) == len(learn.recorder.losses) == 10
        last = probe.seen[:-1]
        assert [round(s*total_weights) for s in learn.recorder.sparsities[:-1]] == last


def constant(value, *ns):
    "`tiny_net` with the same weight throughout the layers `ns`"
    net = tiny_net()
    for n in ns: nn.init.constant_(net[n].weight, value)
    return net


class TestTies:
    "Equal scores"

    @pytest.mark.parametrize('context', ['local', 'global'])
    @pytest.mark.parametrize('criteria', [lambda m: torch.ones_like(m.weight), lambda m: (m.weight > 0).float(),
        Criteria(lambda w, start: (w != start).float())], ids=['ones', 'sign', 'moved'])
    def test_warns_once(self, criteria, context):
        "A criterion that does not tell weights apart: one warning with its name and the layers"
        sp = Sparsifier(tiny_net(), criteria=criteria, context=context)
        said = messages(sp.prune, .3) + messages(sp.prune, .4)
        assert len(said) == 1 and 'same score' in said[0] and ('0, 3, 8' if context == 'global' else '0') in said[0]

    @pytest.mark.parametrize('numba', [True, False])
    def test_magnitudes(self, numba):
        "Layers that were initialized to a constant"
        if numba: pytest.importorskip('numba')
        criteria = 'large_final' if numba else lambda m: m.weight.abs()
        said = messages(Sparsifier(constant(.1, 3), context='local', criteria=criteria).prune, .3)
        assert len(said) == 1 and '1152 of 1152 groups the same score' in said[0] and said[0].endswith('3.')

    def test_taylor_without_loss(self):
        "A loss without a gradient, in a step"
        net = tiny_net()
        (net(torch.randn(2, 4, 6, 6)).sum()*0).backward()
        assert any('same score' in o for o in messages(Sparsifier(net, criteria='taylor').prune, .3))

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize('kwargs', [{}, dict(context='local'), dict(criteria='movement'), dict(criteria='random'),
        dict(criteria='updating_movement'), dict(granularity='2:4'), dict(granularity='filter', layers=nn.Conv2d),
        dict(granularity='layer'), dict(granularity='kernel', layers=nn.Conv2d)], ids=str)
    def test_no_false_alarm(self, dtype, kwargs):
        "Ordinary trainings, in half precision too, to the last weight"
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(4, 64, 3), nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 4)).to(dtype)
        sp = Sparsifier(net, **kwargs)
        def train():
            final = sp.granularity.sparsity or .99
            for i in range(20):
                for p in net.parameters(): p.data += (torch.randn(p.shape)*.01).to(dtype)
                sp.prune(final*(i + 1)/20)
        assert not any('same score' in o for o in messages(train))


class TwoHeads(nn.Module):
    "A body, a head that is used, and one that is used only in some batches"
    def __init__(self, used=lambda i: False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.other = nn.Linear(144, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.used, self.i = used, 0
    def forward(self, x):
        self.i += self.training
        h = self.body(x.flatten(1)).tanh()
        return self.head(h) + (self.other(h) if self.used(self.i) else 0)
    def zeros(self): return {n: int((m.weight == 0).sum()) for n, m in self.named_children()}


sizes = dict(body=144*16, head=64, other=64)
optimizers = {'zero': momentum_sgd, 'none': lambda params, lr: OptimWrapper(params, torch.optim.SGD, lr=lr)}


@needs_gradient
def gradient_only(m): return m.weight.grad.abs()


class TestGradients:
    "Layers without a gradient"

    @pytest.mark.parametrize('opt', optimizers)
    @pytest.mark.parametrize('context', ['local', 'global'])
    @pytest.mark.parametrize('criteria', ['taylor', gradient_only])
    def test_unused_head(self, new_learner, criteria, context, opt):
        "An unused head is left alone, with one warning that names it, and the target holds at the end"
        net = TwoHeads()
        learn, seen = new_learner(net, opt_func=optimizers[opt]), Probe(TwoHeads.zeros)
        said = messages(learn.fit, 3, 1e-2, cbs=[SparsifyCallback(.9, context=context, criteria=criteria), seen])
        assert len([o for o in said if 'could not rank them: other.' in o]) == 1
        assert not any('same score' in o for o in said)
        assert all(o['other'] == 0 for o in seen.seen[:-1])
        if context == 'local': assert net.zeros() == {n: round(.9*k) for n, k in sizes.items()}
        else: assert sum(net.zeros().values()) == round(.9*sum(sizes.values()))

    @pytest.mark.parametrize('opt', optimizers)
    @pytest.mark.parametrize('context', ['local', 'global'])
    def test_layer_drop(self, new_learner, context, opt):
        "A layer that is dropped in some batches keeps its mask in them, and catches up"
        net = TwoHeads(used=lambda i: i % 3 != 1)
        learn, seen = new_learner(net, opt_func=optimizers[opt]), Probe(TwoHeads.zeros)
        learn.fit(3, 1e-2, cbs=[SparsifyCallback(.9, context=context, criteria='taylor'), seen])
        others = [o['other'] for o in seen.seen]
        for i in (3, 6, 9, 12): assert others[i] == others[i-1]
        assert 0 < others[8] < others[-1] < 64
        if context == 'local': assert net.zeros() == {n: round(.9*k) for n, k in sizes.items()}
        else: assert sum(net.zeros().values()) == round(.9*sum(sizes.values()))

    def test_exact_global(self, new_learner):
        "In one pool, the other layers meet the count"
        net, learn = TwoHeads(), None
        learn, seen = new_learner(net), Probe(lambda model: sum(model.zeros().values()))
        learn.fit(3, 1e-2, cbs=[SparsifyCallback(.5, criteria='taylor'), seen])
        assert seen.seen == [round(s*sum(sizes.values())) for s in learn.recorder.sparsities]
        from onecycle_prune.schedule import one_cycle
        assert seen.seen == [round(.5*one_cycle((i + 1)/15)*sum(sizes.values())) for i in range(15)]

    def test_none_at_all(self):
        "Without any gradient, the criterion's own error is raised, and nothing changes"
        net = tiny_net()
        with pytest.raises(ValueError, match='has no gradient'): Sparsifier(net, criteria='taylor').prune(.5)
        assert not total_zeros(net)

    @pytest.mark.parametrize('opt', optimizers)
    def test_no_gradient_in_one_step(self, new_learner, opt):
        "A step after a cancelled `backward`: no layer has a gradient, and no mask changes"
        learn, probe = new_learner(opt_func=optimizers[opt]), Probe(zero_masks)
        def cancel(self):
            if self.iter == 2: raise CancelBackwardException
        said = messages(learn.fit, 2, 1e-2, cbs=[SparsifyCallback(.5, criteria='taylor'),
                                                Callback(before_backward=cancel), probe])
        for i in (2, 7): assert_same(probe.seen[i], probe.seen[i-1])
        assert total_zeros(learn.model) == round(.5*total_weights)
        assert not any('same score' in o for o in said)
