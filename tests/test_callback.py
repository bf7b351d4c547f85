"`SparsifyCallback` keeps its promises in real trainings. Counts are taken from the weights, never from the masks."
from functools import partial

import pytest, torch
from fastai.basics import (Callback, CancelBatchException, CancelStepException, OptimWrapper, Recorder,
    TrainEvalCallback, accuracy, load_learner)
from fastai.callback.all import CSVLogger, GradientAccumulation, SaveModelCallback, SchedCos, TrackerCallback
from onecycle_prune.callback import SparsifyCallback
from torch import nn

from helpers import Probe, assert_same, before_training_batches, bits
from networks import adam, momentum_sgd, n_batches, tiny_net, total_weights
from reference import (anatomy, assert_counts, assert_pattern, conv_axes, count_groups, expected_sparsities, layers_of,
    n_zeros, param_layout, rising, total_zeros, train_by_sort, zero_masks)

contexts = pytest.mark.parametrize('context', ['local', 'global'])
optimizers = pytest.mark.parametrize('opt_func', [momentum_sgd, adam], ids=['sgd', 'adam'])
no_pickle_warning = pytest.mark.filterwarnings('ignore::UserWarning')  # `load_learner` warns of pickles


def train(learn, *args, epochs=3, lr=1e-2, granularity='weight', cbs=(), **kwargs):
    "Train with pruning, and return `count_groups` after each batch"
    probe = Probe(partial(count_groups, granularity=granularity))
    learn.fit(epochs, lr, cbs=[SparsifyCallback(*args, granularity=granularity, **kwargs), probe, *cbs])
    return probe.seen


class StepNotes(Callback):
    "Note which batches reach the end of their step, and say which sparsity holds after each batch"
    order, run_valid = SparsifyCallback.order + 2, False
    def before_fit(self): self.stepped = []
    def before_batch(self): self.done = self.failed = False
    def after_cancel_step(self): self.failed = True
    def after_step(self): self.done = not self.failed
    def after_batch(self): self.stepped.append(self.done)
    def expected(self, sparsities):
        current, res = 0., []
        for stepped, s in zip(self.stepped, sparsities):
            if stepped: current = s
            res.append(current)
        return res


### The counts are exact

@contexts
@pytest.mark.parametrize('granularity', [g for g in conv_axes if g != '2:4'])
def test_counts_of_groups(new_learner, granularity, context):
    seen = train(new_learner(), .8, granularity=granularity, context=context)
    assert_counts(seen, expected_sparsities('one_cycle', .8), context)


@optimizers
@contexts
@pytest.mark.parametrize('schedule', rising)
def test_counts_of_schedules(new_learner, schedule, opt_func, context):
    "Counts are exact after each batch, and a pruned weight stays pruned"
    probe = Probe(zero_masks)
    seen = train(new_learner(opt_func=opt_func), .9, schedule=schedule, context=context, cbs=[probe])
    assert_counts(seen, expected_sparsities(schedule, .9), context)
    assert_counts(seen[-1:], [.9], context)
    for a, b in zip(probe.seen, probe.seen[1:]):
        for n in a: assert not (a[n] & ~b[n]).any()


@contexts
def test_counts_of_falling_schedule(new_learner, context):
    "Counts are exact on the way down too, and no weight is zero at the end"
    seen = train(new_learner(), .8, context=context, schedule='dsd', epochs=4)
    assert_counts(seen, expected_sparsities('dsd', .8, epochs=4), context)
    assert [sum(n_pruned for n_pruned, _ in seen[i].values()) for i in (9, 19)] == [1203, 0]


def test_counts_of_fastai_annealing(new_learner):
    assert_counts(train(new_learner(), .6, schedule=SchedCos(0, 1)), expected_sparsities('cos', .6))


@contexts
def test_ties_by_index(new_learner, context):
    "Of equal weights that no step changes, those with the lowest indices are pruned"
    net = tiny_net()
    for m in layers_of(net).values(): m.weight.data.fill_(.5)
    seen = train(new_learner(net), .7, lr=0., context=context)
    assert_counts(seen, expected_sparsities('one_cycle', .7), context)
    first, *others = [mask.flatten() for mask in zero_masks(net).values()]
    # In one pool all of the first layer is pruned, except for the weight that it keeps.
    pools = [first, *others] if context == 'local' else [torch.cat([first[:-1], *others])]
    for mask in pools: assert not (mask[1:] & ~mask[:-1]).any()


@pytest.mark.parametrize('sparsities', [
    lambda net: dict(zip('038', (.5, .25, .9))),
    lambda net: {net[0]: .5, net[3]: .25, net[8]: .9},
    lambda net: {nn.Conv2d: .25, '0': .5, nn.Linear: .9}], ids=['names', 'modules', 'classes'])
def test_dict(new_learner, sparsities):
    "Where entries of a dict overlap, a layer's own entry counts, not that of its class"
    net = tiny_net()
    seen = train(new_learner(net), sparsities(net))
    for name, s in zip('038', (.5, .25, .9)):
        assert_counts([{name: c[name]} for c in seen], expected_sparsities('one_cycle', s))


def test_dict_leaves_other_layers_dense(new_learner):
    assert all(c['8'][0] == 0 for c in train(new_learner(), {nn.Conv2d: .5}))


def test_dict_in_global_context(new_learner):
    "The layers of one entry form one pool"
    seen = train(new_learner(), {nn.Conv2d: .6, '8': .3}, context='global')
    convs = [{n: c[n] for n in '03'} for c in seen]
    assert_counts(convs, expected_sparsities('one_cycle', .6), 'global')
    assert_counts([{'8': c['8']} for c in seen], expected_sparsities('one_cycle', .3))
    assert convs[-1]['0'][0] != round(.6*convs[-1]['0'][1])


@contexts
@pytest.mark.parametrize('pattern,n_zero', [('2:4', 2), ('1:4', 3), ('1:2', 1)])
def test_pattern(new_learner, pattern, n_zero, context):
    "Counts are exact on the way, and in the end every run of m weights along the input channels has its zeros"
    m = int(pattern[-1])
    learn, probe = new_learner(), Probe(count_groups)
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(granularity=pattern, context=context), probe])
    assert_counts(probe.seen, expected_sparsities('one_cycle', n_zero/m), context)
    assert_pattern(learn.model, n_zero, m)


def test_pattern_after_weights(new_learner):
    "A network in which whole runs of weights were pruned still ends in the pattern"
    learn = new_learner()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.9))
    learn.fit(1, 1e-2, cbs=SparsifyCallback(granularity='2:4', schedule='lin'))
    assert_pattern(learn.model, 2, 4)


@contexts
def test_same_as_plain_loop(new_learner, context):
    "A training is bit for bit the one of a loop in plain PyTorch that sorts all magnitudes"
    torch_sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, weight_decay=.01)
    learn = new_learner(opt_func=torch_sgd)
    learn.fit(3, 1e-2, cbs=SparsifyCallback(.9, context=context, bn_batches=0))
    assert_same(bits(learn.model), bits(train_by_sort(tiny_net(), 3, .9, context)))


@pytest.mark.parametrize('n_acc', [8, 16, 24, 1000])
def test_gradient_accumulation(new_learner, n_acc):
    "Only an optimizer step prunes, also where an epoch does not divide into steps, and the end reaches the target"
    steps = StepNotes()
    seen = train(new_learner(), .9, cbs=[GradientAccumulation(n_acc), steps])
    assert_counts(seen, steps.expected(expected_sparsities('one_cycle', .9)))
    assert sum(steps.stepped) == {8: 12, 16: 6, 24: 4, 1000: 0}[n_acc]


@pytest.mark.parametrize('order', [0, SparsifyCallback.order+1])
@pytest.mark.parametrize('ex', [CancelStepException, CancelBatchException])
@pytest.mark.parametrize('event', ['before_backward', 'before_step'])
def test_cancelled_steps(new_learner, ex, event, order):
    "Another callback skips steps, as mixed precision does when gradients overflow, or whole batches"
    if event == 'before_backward': ex = CancelBatchException
    def skip(self):
        if self.iter % 2: raise ex
    cb, steps = Callback(**{event: skip}), StepNotes()
    cb.order = order
    learn = new_learner()
    seen = train(learn, .9, cbs=[cb, steps])
    assert sum(steps.stepped) == 9
    assert_counts(seen, steps.expected(expected_sparsities('one_cycle', .9)))
    assert len(learn.recorder.sparsities) == len(seen)


def test_cancelled_after_the_step(new_learner):
    "A batch that is cancelled between the step and the pruning prunes nothing new, and regrows nothing"
    def cancel(self):
        if self.iter % 2: raise CancelBatchException
    steps = StepNotes()
    seen = train(new_learner(opt_func=momentum_sgd), .9, cbs=[Callback(after_step=cancel), steps])
    assert_counts(seen, steps.expected(expected_sparsities('one_cycle', .9)))


def test_without_recorder(new_learner):
    learn = new_learner(default_cbs=False, cbs=TrainEvalCallback)
    assert_counts(train(learn, .9), expected_sparsities('one_cycle', .9))


### The forward pass and the validation see the pruned weights

@optimizers
def test_forward_sees_pruned_weights(new_learner, opt_func):
    "Neither momentum nor weight decay brings a weight back into a forward pass"
    probe, seen = Probe(n_zeros), []
    spy = before_training_batches(lambda learn: seen.append(n_zeros(learn.model)))
    new_learner(opt_func=opt_func).fit(3, 1e-2, cbs=[SparsifyCallback(.9), probe, spy])
    assert seen[1:] == probe.seen[:-1] and all(seen[-1].values())


def test_validation_sees_pruned_weights(new_learner):
    train_probe, valid_probe = Probe(n_zeros), Probe(n_zeros, when='valid')
    new_learner().fit(3, 1e-2, cbs=[SparsifyCallback(.9), train_probe, valid_probe])
    ends = train_probe.seen[n_batches-1::n_batches]
    assert valid_probe.seen == [o for o in ends for _ in range(2)]
    assert ends[0] != ends[1] != ends[2]


### No layer collapses

@pytest.mark.parametrize('sparsity', [.99, .995])
def test_no_layer_collapses(new_learner, sparsity):
    "A layer with by far the smallest weights keeps one, and the total is exact all the same"
    net = tiny_net()
    net[3].weight.data *= 1e-6
    seen = train(new_learner(net), sparsity, lr=1e-9, context='global')
    assert_counts(seen, expected_sparsities('one_cycle', sparsity), 'global')
    assert seen[-1]['3'] == (16*8*9 - 1, 16*8*9)


@pytest.mark.parametrize('granularity,context', [('weight', 'global'), ('filter', 'local'), ('filter', 'global')])
def test_sparsity_one_keeps_one(new_learner, granularity, context):
    "Sparsity 1 keeps one group of each layer, and warns"
    with pytest.warns(UserWarning, match='One group of each layer is kept'):
        seen = train(new_learner(), 1, granularity=granularity, context=context)
    assert all(n_pruned == n-1 for n_pruned, n in seen[-1].values())


def test_small_layer_keeps_one(new_learner):
    "By rounding, all three weights of the layer in the middle would be pruned"
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3), nn.Linear(3, 1), nn.Linear(1, 4))
    with pytest.warns(UserWarning, match='^2: a sparsity of 0.9 would prune 3 of 3 groups'):
        seen = train(new_learner(net), {'1': .9, '2': .9, '3': .5})
    assert seen[-1] == {'1': (round(.9*432), 432), '2': (2, 3), '3': (2, 4)}


### The model stays the user's model

@pytest.mark.parametrize('granularity', ['weight', 'filter', '2:4'])
def test_model_is_untouched(new_learner, granularity):
    "During and after a training, nothing is attached to the model"
    learn = new_learner()
    before, keys, probe = anatomy(learn.model), list(learn.model.state_dict()), Probe(anatomy)
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5, granularity=granularity), probe])
    assert len(probe.seen) == 2*n_batches
    assert all(o == before for o in probe.seen + [anatomy(learn.model)])
    assert list(learn.model.state_dict()) == keys


def test_in_place(new_learner):
    "Parameters stay the same objects, in the same memory and layout"
    net = tiny_net().to(memory_format=torch.channels_last)
    before, probe = param_layout(net), Probe(param_layout)
    learn = new_learner(net)
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5), probe])
    assert all(o == before for o in probe.seen) and len(probe.seen) == 2*n_batches
    assert net[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert total_zeros(net) == round(.5*total_weights)


@no_pickle_warning
def test_export_with_callback(item_learner):
    "A callback that stays on the learner is exported with it, and can train there"
    learn = item_learner(cbs=SparsifyCallback(.9))
    learn.fit(1, 1e-2)
    learn.export('learner.pkl')
    other = load_learner(learn.path/'learner.pkl')
    assert torch.equal(other.predict(3)[2], learn.predict(3)[2])
    other.dls = learn.dls
    other.fit(1, 1e-2)
    assert total_zeros(other.model) == round(.9*total_weights)


### The training table

recorders = [{}, dict(add_time=False), dict(train_metrics=True), dict(train_metrics=True, valid_metrics=False)]


@pytest.mark.parametrize('recorder', recorders, ids=str)
def test_column(new_learner, recorder):
    "Names and values are in the same order, and the column comes after the metrics"
    learn = new_learner(metrics=[accuracy])
    learn.remove_cb(Recorder).add_cb(Recorder(**recorder))
    logged = []
    learn.logger = logged.append
    learn.fit(3, 1e-2, cbs=SparsifyCallback(.9))
    names = learn.recorder.metric_names
    i = names.index('sparsity')
    assert names[i+1:] == (['time'] if recorder.get('add_time', True) else [])
    ends = expected_sparsities('one_cycle', .9)[n_batches-1::n_batches]
    assert [len(row) for row in logged] == [len(names)]*3
    assert [row[i] for row in logged] == pytest.approx([round(s*total_weights)/total_weights for s in ends], abs=2e-3)
    assert [v[i-1] for v in learn.recorder.values] == [row[i] for row in logged]
    assert logged[-1][i] == total_zeros(learn.model) / total_weights
    assert all(0 <= row[names.index(n)] <= 1 for row in logged for n in names if 'accuracy' in n)


def test_column_of_sparsity_zero(new_learner):
    learn = new_learner(opt_func=adam)
    learn.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback(0))
    assert learn.recorder.metric_names.index('sparsity') == 3 and learn.recorder.values[-1][2] == 0


def test_csv(new_learner):
    learn = new_learner(metrics=accuracy)
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.9), CSVLogger()])
    df = CSVLogger.read_log(type('', (), dict(path=learn.path, fname='history.csv')))
    assert list(df) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'time']
    assert df.sparsity.iloc[-1] == learn.recorder.values[-1][3] == total_zeros(learn.model) / total_weights
    assert df.accuracy.between(0, 1).all() and df.epoch.tolist() == [0, 1]


@pytest.mark.parametrize('monitor', ['sparsity', 'accuracy', 'valid_loss'])
def test_tracker(new_learner, monitor):
    learn = new_learner(metrics=accuracy)
    tracker = TrackerCallback(monitor)
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(.9), tracker])
    values = [v[['train_loss', 'valid_loss', 'accuracy', 'sparsity'].index(monitor)] for v in learn.recorder.values]
    assert tracker.best == (min if 'loss' in monitor else max)(values)


def test_save_best_sparsity(new_learner):
    "With monitor='sparsity', the last epoch is the one that is loaded at the end"
    learn = new_learner()
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(.9), SaveModelCallback(monitor='sparsity', with_opt=True)])
    assert total_zeros(learn.model) == round(.9*total_weights)


def test_sparsities_outlive_validation(new_learner):
    "The sparsities of a training can be read after a validation"
    learn = new_learner(cbs=SparsifyCallback(.9))
    learn.fit(2, 1e-2)
    before = list(learn.recorder.sparsities)
    learn.validate()
    assert learn.recorder.sparsities == before and len(before) == 2*n_batches


### One callback in several trainings, and on the learner

@pytest.mark.parametrize('first,second', [(.9, .5), (.3, .8)])
def test_second_fit_in_global_context(new_learner, first, second):
    learn = new_learner()
    for s in first, second: assert_counts(train(learn, s, context='global')[-1:], [s], 'global')


@pytest.mark.parametrize('opt_func', [adam, momentum_sgd, partial(OptimWrapper, opt=torch.optim.Adam)],
    ids=['adam', 'sgd', 'pytorch'])
def test_zeros_before(new_learner, opt_func, recwarn):
    "Zeros that a network begins with count as pruned, and a warning says so; zeros of an earlier fit are no surprise"
    def n_warnings(): return sum('Weights that are zero count as pruned' in str(w.message) for w in recwarn)
    net = tiny_net()
    nn.init.dirac_(net[3].weight)
    learn = new_learner(net, opt_func=opt_func)
    train(learn, .95, epochs=1)
    assert n_warnings() == 1 and '3 (99%)' in str(recwarn.list[0].message)
    train(learn, .97, epochs=1)
    learn.save('pruned')
    resumed = new_learner(tiny_net(), opt_func=opt_func)
    resumed.load('pruned')
    train(resumed, .97, epochs=2, lr=1e-2)
    assert n_warnings() == 1
    # A learner that has not trained cannot know.
    train(new_learner(learn.model, opt_func=opt_func), .98, epochs=1)
    assert n_warnings() == 2


def test_same_callback_twice(new_learner):
    "A callback remembers nothing of an earlier training"
    learn, cb = new_learner(), SparsifyCallback(.9)
    learn.fit(1, 1e-2, cbs=cb)
    other = new_learner()
    other.fit(2, 1e-2, cbs=cb)
    fresh = new_learner()
    fresh.fit(2, 1e-2, cbs=SparsifyCallback(.9))
    assert_same(bits(other.model), bits(fresh.model))


def test_on_learner_or_in_fit(new_learner):
    "A callback given to the learner does the same as one given to `fit`"
    on_learner, in_fit = new_learner(cbs=SparsifyCallback(.9)), new_learner()
    on_learner.fit(2, 1e-2)
    in_fit.fit(2, 1e-2, cbs=SparsifyCallback(.9))
    assert_same(bits(on_learner.model), bits(in_fit.model))
    assert on_learner.recorder.sparsities == in_fit.recorder.sparsities
    assert len(in_fit.recorder.sparsities) == 2*n_batches


def test_monitored_lr_find(new_learner):
    "`lr_find` leaves the model as it was, also with a `TrackerCallback` of the sparsity, and pruning works after it"
    learn = new_learner(cbs=[SparsifyCallback(.9), TrackerCallback('sparsity')])
    before, probe = bits(learn.model), Probe(total_zeros)
    with learn.no_bar(), learn.added_cbs(probe): learn.lr_find(num_it=8, show_plot=False, suggest_funcs=())
    assert_same(before, bits(learn.model))
    assert len(probe.seen) >= 5 and not any(probe.seen)
    learn.fit(1, 1e-2)
    assert total_zeros(learn.model) == round(.9*total_weights)


### Which layers

@pytest.mark.parametrize('choice,chosen', [
    (nn.Linear, '8'), ('3', '3'), (['0', nn.Linear], '08'), (lambda m: m.weight.numel() > 1000, '3')],
    ids=['class', 'name', 'list', 'function'])
def test_layers(new_learner, choice, chosen):
    "Only the chosen layers are pruned"
    seen = train(new_learner(), .9, layers=choice)
    assert_counts([{n: c[n] for n in chosen} for c in seen], expected_sparsities('one_cycle', .9))
    assert all(c[n][0] == 0 for c in seen for n in c if n not in chosen)


def test_frozen_layers(new_learner):
    "Frozen layers are not pruned, and a warning names them"
    net = tiny_net()
    net[0].requires_grad_(False)
    before = bits(net[0])
    with pytest.warns(UserWarning, match='Frozen layers are not pruned: 0'): seen = train(new_learner(net), .9)
    assert_same(before, bits(net[0]))
    assert_counts([{n: c[n] for n in '38'} for c in seen], expected_sparsities('one_cycle', .9))
