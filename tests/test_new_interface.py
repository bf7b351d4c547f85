"Answers to common mistakes, the `repr` of objects, the state of a sparsifier, and a learner that is left as it was."
import inspect, io, re

import pytest, torch
from fastai.basics import Callback, CancelFitException, Learner
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.criteria import Criteria
from onecycle_prune.granularity import Granularity
from onecycle_prune.report import plot_layers, sparsity_report
from onecycle_prune.schedule import Schedule
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits
from networks import n_batches, n_weights, tiny_net, total_weights
from reference import assert_counts, count_groups, expected_sparsities, n_zeros, total_zeros

arguments = ['sparsity', 'granularity', 'context', 'criteria', 'schedule', 'layers']


### Mistakes are answered when the callback is built

@pytest.mark.parametrize('sparsity', ['90%', '90 %', '0.9', 90], ids=repr)
def test_hint_for_sparsity(sparsity):
    with pytest.raises(ValueError, match=r'Did you mean 0\.9\?'): SparsifyCallback(sparsity)


@pytest.mark.parametrize('sparsity', ['150%', '150', 'high', '', 101])
def test_no_hint_for_sparsity(sparsity):
    "What is no fraction and no percentage is answered without a guess"
    with pytest.raises(ValueError, match=r'fraction in \[0, 1\]') as raised: SparsifyCallback(sparsity)
    assert 'Did you mean' not in str(raised.value)


def test_hint_for_sparsity_in_dict():
    with pytest.raises(ValueError, match=r'Did you mean 0\.9\?'): SparsifyCallback({'0': .5, '3': '90%'})


@pytest.mark.parametrize('given,meant', [
    (dict(criterion='taylor'), 'criteria'), (dict(end_sparsity=.9), 'sparsity'),
    (dict(schedule_func='agp'), 'schedule'), (dict(granularty='weight'), 'granularity')], ids=str)
def test_unknown_argument(given, meant):
    "A `TypeError` names the right argument and lists the allowed ones"
    sparsity = () if meant == 'sparsity' else (.9,)
    with pytest.raises(TypeError) as e: SparsifyCallback(*sparsity, **given)
    message = str(e.value)
    assert f"Did you mean '{meant}'?" in message
    allowed = message.partition('Allowed: ')[2]
    for name in arguments: assert re.search(rf'\b{name}\b', allowed)


wrong_kinds = [
    (dict(criteria=Criteria), r'criterion.*Criteria.*Allowed: .*large_final'),
    (dict(schedule=Schedule), r'schedule.*Schedule.*Allowed: .*one_cycle'),
    (dict(granularity=Granularity), r'granularity.*Granularity.*Allowed: .*weight'),
    (dict(layers=nn.BatchNorm2d), r'BatchNorm2d.*Allowed: .*Conv2d.*Linear'),
    (dict(layers=nn.Dropout), r'Dropout.*Allowed: .*Conv2d.*Linear'),
    (dict(layers=nn.PReLU), r'PReLU.*Allowed: .*Conv2d.*Linear'),
    (dict(layers=3), r'layers?: 3.*Allowed: .*Conv2d.*Linear'),
    (dict(layers=['0', 3]), r'layers?: 3.*Allowed: .*Conv2d.*Linear'),
    (dict(layers=[None]), r'layers?: None.*Allowed: .*Conv2d.*Linear')]


@pytest.mark.parametrize('kwargs,message', wrong_kinds, ids=lambda o: str(o) if isinstance(o, dict) else '')
def test_wrong_kind(kwargs, message):
    "A class in place of an instance, and layers that can never be pruned"
    with pytest.raises(ValueError, match=message): SparsifyCallback(.9, **kwargs)


def messages():
    "The errors of many mistakes"
    attempts = [lambda kwargs=kwargs: SparsifyCallback(.9, **kwargs) for kwargs, _ in wrong_kinds]
    for name in arguments:
        for value in 'xyz', 3.5, object, []:
            attempts.append(lambda name=name, value=value: SparsifyCallback(**{'sparsity': .9, name: value}))
    for model in tiny_net(), nn.Sequential(nn.ReLU()), nn.Sequential(), nn.BatchNorm1d(3), nn.Linear:
        for layers in None, [], 'head', nn.Conv3d, nn.Linear(2, 2), lambda m: False:
            attempts.append(lambda model=model, layers=layers: Sparsifier(model, layers=layers))
        for sparsity in {'head': .5}, {nn.Conv3d: .5}, {nn.Conv2d: .5, '0': .5, '3': .5}:
            attempts.append(lambda model=model, sparsity=sparsity: Sparsifier(model).prune(sparsity))
    for attempt in attempts:
        try: attempt()
        except Exception as e: yield str(e)


def test_no_empty_lists():
    "No message lists nothing"
    found = list(messages())
    assert len(found) > 40
    for message in found: assert not re.search(r'Allowed: *\.|is none:|: *\.$|: none\b', message), message


### A `Learner` in place of its model

def test_learner_in_sparsifier(new_learner):
    learn = new_learner()
    sp = Sparsifier(learn)
    sp.prune(.5)
    assert total_zeros(learn.model) == round(.5*total_weights) and [*sp.masks] == [*n_weights]


def test_learner_in_reports(new_learner):
    learn = new_learner()
    Sparsifier(learn.model).prune(.5)
    assert sparsity_report(learn).equals(sparsity_report(learn.model))
    def widths(of): return [[bar.get_width() for bar in bars] for bars in plot_layers(of).containers]
    assert widths(learn) == widths(learn.model)
    assert widths({'pruned': learn}) == widths(learn.model)


@pytest.mark.parametrize('of', [Sparsifier, sparsity_report, plot_layers])
@pytest.mark.parametrize('model', [nn.Linear, tiny_net, 3], ids=['class', 'function', 'number'])
def test_no_model(of, model):
    with pytest.raises(ValueError, match='model'): of(model)


def test_default_layers(new_learner):
    "`layers=None` means all convolutions and linear layers"
    learns = [new_learner(), new_learner()]
    for learn, kwargs in zip(learns, ({}, dict(layers=None))): learn.fit(1, 1e-2, cbs=SparsifyCallback(.9, **kwargs))
    assert_same(*(bits(learn.model) for learn in learns))
    assert all(n_zeros(learns[0].model).values())


### `repr` and signature

def test_repr_of_callback():
    said = repr(SparsifyCallback(.9, 'filter', 'local', 'movement', 'agp'))
    for word in ('SparsifyCallback', '0.9', 'filter', 'local', 'movement', 'agp'): assert word in said
    assert re.search('0.9.*weight.*large_final.*one_?cycle', repr(SparsifyCallback(.9)))


def test_repr_of_sparsifier():
    sp = Sparsifier(tiny_net())
    for n_pruned in 0, 752:
        sp.prune(n_pruned/total_weights)
        said = repr(sp)
        for word in ('Sparsifier', 'weight', 'global', 'large_final'): assert word in said
        numbers = re.findall(r'\d+', said.replace(',', '').replace('_', ''))
        for n in (3, total_weights, n_pruned): assert str(n) in numbers


def test_repr_of_pool():
    sp = Sparsifier(tiny_net())
    sp.prune(.5)
    pool, = sp.pools
    for word in ('Pool', '0, 3, 8', '1504', '752'): assert word in repr(pool)


def test_signature():
    "The signature is short, and the docstring explains each argument"
    assert len(str(inspect.signature(SparsifyCallback))) < 200
    for name in arguments: assert re.search(rf'^{name}: \w', SparsifyCallback.__init__.__doc__, re.M)


### The state of a sparsifier

def saved(sp):
    "The state after a round trip through a file"
    torch.save(sp.state_dict(), file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def with_chance_zeros(sparsity=.5, **kwargs):
    "A sparsifier whose model has weights that are zero but not pruned"
    net = tiny_net()
    sp = Sparsifier(net, **kwargs)
    sp.prune(sparsity)
    with torch.no_grad():
        for n, mask in sp.masks.items():
            w = net[int(n)].weight
            w.view(-1)[mask.flatten().nonzero()[:3, 0]] = 0.
    assert total_zeros(net) > sum(int((~mask).sum()) for mask in sp.masks.values())
    return net, sp


with_settings = pytest.mark.parametrize('kwargs', [
    {}, dict(context='local'), dict(granularity='kernel', layers=nn.Conv2d),
    dict(granularity='filter', layers=nn.Conv2d), dict(criteria='movement')], ids=str)


@with_settings
def test_state_dict(kwargs):
    "It holds bool masks, True = pruned, and what the criterion remembers"
    _, sp = with_chance_zeros(**kwargs)
    state = saved(sp)
    assert set(state) == {'pruned', 'memory'} and [*state['pruned']] == [*sp.layers]
    for n, pruned in state['pruned'].items():
        assert pruned.dtype == torch.bool
        assert pruned.float().mean() == (~sp.masks[n]).float().mean()
    assert [*state['memory']] == ([*sp.layers] if kwargs.get('criteria') == 'movement' else [])


@with_settings
def test_state_round_trip(kwargs):
    "A new sparsifier with this state has the same masks, and continues exactly"
    net, sp = with_chance_zeros(**kwargs)
    other = tiny_net()
    other.load_state_dict(net.state_dict())
    new = Sparsifier(other, **kwargs)
    new.load_state_dict(saved(sp))
    assert_same(new.masks, sp.masks)
    for s in .5, .7, .3, .9:
        assert new.prune(s) == sp.prune(s)
        assert_same(new.masks, sp.masks)
        assert_same(bits(other), bits(net))


def test_counts_after_load():
    "After a state is loaded, counts are exact, with zeros by chance that are not pruned"
    net, sp = with_chance_zeros()
    other = tiny_net()
    other.load_state_dict(net.state_dict())
    new = Sparsifier(other)
    new.load_state_dict(saved(sp))
    assert sum(int((~mask).sum()) for mask in new.masks.values()) == round(.5*total_weights)
    for s in .5, .7: assert new.prune(s) == round(s*total_weights)/total_weights
    assert_counts([count_groups(other)], [.7])


def test_load_zeroes_weights():
    "Weights that the state says are pruned are zero after it is loaded, all others are as before"
    sp = Sparsifier(tiny_net())
    sp.prune(.5)
    dense = tiny_net()
    before, new = bits(dense), Sparsifier(dense)
    new.load_state_dict(saved(sp))
    for n, mask in sp.masks.items(): before[f'{n}.weight'] *= mask
    assert_same(bits(dense), before)
    assert total_zeros(dense) == round(.5*total_weights)


def spoil_layers(state): state['pruned']['9'] = state['pruned'].pop('8')
def spoil_shapes(state): state['pruned']['8'] = state['pruned']['8'][:-1]
def lose_layer(state): del state['pruned']['8']
def spoil_memory(state): state['memory']['8'] = state['memory']['8'][:-1]
def lose_memory(state): state['memory'] = {}
def lose_part(state): del state['memory']


@pytest.mark.parametrize('spoil', [spoil_layers, spoil_shapes, lose_layer, spoil_memory, lose_memory, lose_part])
def test_wrong_state(spoil):
    "A state of other layers or shapes raises an error before anything changes"
    state = saved(with_chance_zeros(criteria='movement')[1])
    spoil(state)
    net = tiny_net()
    sp = Sparsifier(net, criteria='movement')
    sp.prune(.3)
    before, own = bits(net), saved(sp)
    with pytest.raises(ValueError): sp.load_state_dict(state)
    assert_same(bits(net), before)
    for part in own: assert_same(saved(sp)[part], own[part])


### The learner is left as it was

def test_learner_class_untouched():
    "No method of `Learner` is replaced; `sparsity_find` is added, as fastai adds `lr_find`"
    modules = {n: getattr(f, '__module__', None) or '' for n, f in vars(Learner).items()}
    assert {n for n, module in modules.items() if module.startswith('onecycle_prune')} <= {'sparsity_find'}
    assert Learner._do_fit.__module__ == Learner.save.__module__ == 'fastai.learner'


def own_functions(learn):
    "Attributes of this learner that stand in for methods; fastai keeps callbacks as attributes too"
    return {k: v for k, v in vars(learn).items() if callable(v) and not isinstance(v, Callback)}


@pytest.mark.parametrize('where', ['fit', 'learner'])
@pytest.mark.parametrize('event', ['before_batch', 'after_step', 'before_validate', 'before_epoch', 'after_epoch'])
@pytest.mark.parametrize('ex', [KeyboardInterrupt, CancelFitException, RuntimeError('broken'), None],
    ids=['ctrl-c', 'cancel', 'error', 'to the end'])
def test_learner_instance_untouched(new_learner, ex, event, where):
    "However a fit ends, no attribute of the learner stands in for a method, and the next fit is an ordinary one"
    learn = new_learner()
    learn.fit(1, 1e-2)
    before = own_functions(learn)
    def leave(self):
        if ex and self.epoch == 1: raise ex
    cbs = [Callback(**{event: leave}), SparsifyCallback(.9, criteria='movement')]  # its memory is saved with the model
    if where == 'learner': learn.add_cb(cbs.pop())
    try: learn.fit(2, 1e-2, cbs=cbs)
    except (KeyboardInterrupt, RuntimeError): assert ex not in (None, CancelFitException)
    else: assert ex in (None, CancelFitException)
    assert own_functions(learn) == before
    if where == 'fit': learn.add_cb(SparsifyCallback(.9))
    learn.fit(1, 1e-2)
    assert total_zeros(learn.model) == round(.9*total_weights)
    assert own_functions(learn) == before


def test_error_before_first_batch(new_learner):
    "A fit that cannot begin leaves no attribute on the learner either"
    learn = new_learner()
    learn.fit(1, 1e-2)
    before = own_functions(learn)
    def fail(self): raise RuntimeError('broken')
    late = Callback(before_fit=fail)
    late.order = SparsifyCallback.order + 10
    with pytest.raises(RuntimeError): learn.fit(1, 1e-2, cbs=[SparsifyCallback(.9), late])
    learn.fit(1, 1e-2)
    assert own_functions(learn) == before


### What `import *` brings

def test_star_import():
    names = {}
    exec('from onecycle_prune.all import *', names)
    assert not {'cos', 'lin', 'conv', 'linear', 'random'} & set(names)
    assert {'SparsifyCallback', 'Sparsifier', 'sparsity_report', 'plot_layers'} <= set(names)


def test_sparsities_of_recorder(new_learner):
    "`recorder.pruned_losses` holds the losses of the training that `recorder.sparsities` belongs to"
    learn = new_learner()
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.9))
    recorder = learn.recorder
    assert len(recorder.pruned_losses) == len(recorder.sparsities) == 2*n_batches
    assert recorder.pruned_losses == recorder.losses
    assert recorder.sparsities == pytest.approx(expected_sparsities('one_cycle', .9, 2), abs=1/total_weights)
