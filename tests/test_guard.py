"What becomes of a model and of a learner when a pruned fit ends."
import copy, gc, weakref

import pytest, torch
from fastai.basics import Callback
from fastai.callback.all import SaveModelCallback
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.guard import KeepPruned, averaged_models
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits
from networks import n_weights, tiny_net, total_weights
from reference import n_zeros, total_zeros


@pytest.mark.parametrize('kwargs', [{}, dict(granularity='filter'), dict(criteria='movement')], ids=str)
def test_no_model_kept_alive(new_learner, kwargs):
    "A callback that the user still holds does not keep the model alive, and has its masks as long as it lives"
    learn, cb = new_learner(), SparsifyCallback(.5, **kwargs)
    learn.fit(1, 1e-2, cbs=cb)
    assert_same({n: m.clone() for n, m in cb.sparsifier.masks.items() if n != '8'},
                {n: learn.model[int(n)].weight != 0 for n in '03'})
    alive = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert alive() is None


def test_nothing_left_on_the_learner(new_learner):
    "After a fit, and after one that could not begin, no callback of this package but the default one is left"
    learn = new_learner()
    before = {type(cb) for cb in learn.cbs}
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.5))
    assert {type(cb) for cb in learn.cbs} == before
    def fail(self): raise RuntimeError('broken')
    broken = Callback(before_fit=fail)
    broken.order = 2000
    with pytest.raises(RuntimeError): learn.fit(1, 1e-2, cbs=[SparsifyCallback(.7), broken])
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    assert {type(cb) for cb in learn.cbs} == before and total_zeros(learn.model) == round(.8*total_weights)


def test_other_architecture(new_learner):
    "A model with other layers in place of the learner's: a warning names the missing layers and the true sparsity"
    learn = new_learner()
    def replace(self): self.learn.model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    with pytest.warns(UserWarning, match=r'does not have these layers, which are pruned: 0, 3, 8. 0 of its weights'):
        learn.fit(1, 1e-2, cbs=[SparsifyCallback(.9), Callback(after_train=replace)])


def test_best_epoch(new_learner):
    "The best epoch is loaded as it was saved; a warning says how sparse it is"
    learn, saved = new_learner(), []
    # The loss rises, so the first epoch is the best.
    spoil = Callback(after_train=lambda self: self.model[8].bias.data.add_(torch.tensor([9., 0, 0, 0])))
    note = Callback(after_epoch=lambda self: saved.append(bits(self.model)))
    with pytest.warns(UserWarning, match=r'It is less sparse than the last one: 0\.\d+ of its weights are zero'):
        learn.fit(3, 1e-2, cbs=[SparsifyCallback(.9), spoil, note, SaveModelCallback()])
    assert_same(bits(learn.model), saved[0])


@pytest.mark.parametrize('name,found', [('model_ema', True), ('ema', True), ('ema_model', True), ('swa_model', True),
    ('averaged', True), ('teacher', False), ('schema', False), ('remaining', False), ('thema', False)])
def test_names_of_averages(new_learner, name, found):
    learn = new_learner()
    setattr(learn, name, copy.deepcopy(learn.model))
    assert len(averaged_models(learn)) == found


def test_classes_of_averages(new_learner):
    "timm's classes, of any version, and torch's"
    class ModelEmaV3(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = copy.deepcopy(model)
    learn, cb = new_learner(), Callback()
    cb.copies, cb.other = ModelEmaV3(learn.model), torch.optim.swa_utils.AveragedModel(learn.model)
    learn.fit(1, 1e-2, cbs=[SparsifyCallback(.9), cb])
    assert total_zeros(cb.copies.module) == total_zeros(cb.other.module) == round(.9*total_weights)


class TestSparsifier:
    "In a loop of one's own"

    def test_apply_to_copy(self):
        "Masks are applied to a copy by name, and layers that it lacks are returned"
        net = tiny_net()
        sp = Sparsifier(net)
        other = copy.deepcopy(net)
        sp.prune(.9)
        assert sp.apply(other) == [] and n_zeros(other) == n_zeros(net)
        assert sp.apply(tiny_net()[:6]) == ['8']
        assert sp.apply(nn.DataParallel(tiny_net())) == []

    @pytest.mark.parametrize('context', ['local', 'global'])
    @pytest.mark.parametrize('criteria', ['large_final', 'movement', 'updating_movement'])
    def test_freed(self, context, criteria):
        "A layer that is freed joins, and the counts are exact from the next step on"
        net = tiny_net()
        net[0].requires_grad_(False)
        with pytest.warns(UserWarning, match='Frozen layers are not pruned: 0'):
            sp = Sparsifier(net, context=context, criteria=criteria)
        def train():
            with torch.no_grad():
                for p in net.parameters():
                    if p.requires_grad: p.add_(torch.randn_like(p)*.1)
        torch.manual_seed(0)
        train()
        sp.prune(.5)
        assert not n_zeros(net)['0'] and total_zeros(net) == round(.5*(total_weights - n_weights['0']))
        net[0].requires_grad_(True)
        train()
        sp.prune(.6)
        if context == 'global': assert total_zeros(net) == round(.6*total_weights)
        else: assert n_zeros(net) == {n: round(.6*k) for n, k in n_weights.items()}
        assert list(sp.masks) == ['0', '3', '8']

    def test_freed_state(self):
        "The state of a sparsifier whose layers were freed is taken over by one with frozen layers"
        net = tiny_net()
        sp = Sparsifier(net)
        sp.prune(.5)
        state = copy.deepcopy(sp.state_dict())
        other = tiny_net()
        other[0].requires_grad_(False)
        with pytest.warns(UserWarning, match='Frozen'): second = Sparsifier(other)
        second.load_state_dict(state)
        assert_same(second.pruned, sp.pruned)
        assert n_zeros(other) == n_zeros(net)

    def test_joined_floor(self):
        "What is pruned in a layer that joins stays pruned"
        net = tiny_net()
        first = Sparsifier(net)
        first.prune(.5)
        before = net[0].weight == 0
        net[0].requires_grad_(False)
        with pytest.warns(UserWarning, match='Frozen'): sp = Sparsifier(net, context='local')
        sp.set_floor(.9)
        sp.prune(.1)
        net[0].requires_grad_(True)
        net[0].weight.data += torch.randn_like(net[0].weight)
        sp.prune(.1)
        assert ((net[0].weight == 0) == before).all()

    def test_release(self):
        "A released sparsifier still prunes, as long as the model lives"
        net = tiny_net()
        sp = Sparsifier(net)
        sp.release()
        sp.prune(.5)
        assert total_zeros(net) == round(.5*total_weights)
        alive = weakref.ref(net)
        del net
        gc.collect()
        assert alive() is None

    @pytest.mark.gpu
    def test_moved(self):
        "Masks and memory follow a model to another device"
        for criteria in ['large_final', 'movement']:
            net = tiny_net()
            sp = Sparsifier(net, criteria=criteria)
            sp.prune(.5)
            net.cuda()
            for p in net.parameters(): p.data += torch.randn_like(p)
            sp.prune(.9)
            assert total_zeros(net.cpu()) == round(.9*total_weights)
            sp.prune(.95)
            assert total_zeros(net) == round(.95*total_weights)


def test_keep_pruned_pickles():
    "Without the sparsifier, and as a class that needs no package"
    import pickle
    assert type(pickle.loads(pickle.dumps(KeepPruned(Sparsifier(tiny_net()), None)))) is Callback
