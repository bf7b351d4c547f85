"The promises of pruning, kept in real trainings: counts are taken from the weights alone, never from the masks."
import math
from functools import partial

import pytest, torch
from fastai.basics import CancelStepException, Callback, OptimWrapper, Recorder, TrainEvalCallback, accuracy, load_learner
from fastai.callback.all import CSVLogger, GradientAccumulation, SaveModelCallback, SchedCos, TrackerCallback
from fastai.optimizer import Adam
from onecycle_prune.all import *
from torch import nn

from conftest import assert_same, bits, n_zeros, quick_sgd, tiny_data, tiny_dls, tiny_net

adam = partial(Adam, wd=.05)
n_batches = 5  # an epoch of `tiny_dls`

# the curves of the schedules, written anew: position t in (0, 1] to progress
progress = dict(
    one_cycle=lambda t: (1 + math.exp(-8)) / (1 + math.exp(6 - 14*t)),
    one_shot=lambda t: float(t >= .5),
    iterative=lambda t: math.ceil((t-.2)/.8*3 - 1e-9)/3 if t >= .2 else 0,
    agp=lambda t: 1 - (1 - (t-.2)/.8)**3 if t >= .2 else 0,
    cos=lambda t: (1 - math.cos(math.pi*t)) / 2,
    lin=lambda t: t,
    dsd=lambda t: (1 - math.cos(2*math.pi*t)) / 2)
rising = [s for s in progress if s != 'dsd']

# the axes of a weight that one group spans: of a convolution's (out, in, h, w), and of a linear layer's (out, in)
conv_axes = dict(weight=(), row=3, column=2, kernel=(2, 3), channel=1, filter=(1, 2, 3), shared_weight=0, shared_kernel=(0, 2, 3))
linear_axes = dict(weight=(), row=1, column=0)


class Probe(Callback):
    "After each batch, note `f(model)`"
    order = SparsifyCallback.order + 1
    def __init__(self, f, when='train'): self.f, self.seen, self.when = f, [], when
    def after_batch(self):
        if (self.when == 'train') == self.training: self.seen.append(self.f(self.model))


def layers(model): return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def silent(m, granularity):
    "Which groups of a layer are zero in every weight, or None where it has no such groups"
    axes = (conv_axes if isinstance(m, nn.Conv2d) else linear_axes).get(granularity)
    return None if axes is None else m.weight == 0 if axes == () else ~(m.weight != 0).any(axes)


def groups(model, granularity):
    "For each layer with such groups, how many are silent and how many there are"
    found = {n: silent(m, granularity) for n, m in layers(model).items()}
    return {n: (int(s.sum()), s.numel()) for n, s in found.items() if s is not None}


n_weights = 1504  # of `tiny_net`, in its three layers
def total(model): return sum(n_zeros(model).values())


def zero_masks(model): return {n: m.weight == 0 for n, m in layers(model).items()}


def train(learn, *args, epochs=3, lr=1e-2, granularity='weight', cbs=(), **kwargs):
    "Train with pruning, and return `groups` after each batch"
    probe = Probe(partial(groups, granularity=granularity))
    learn.fit(epochs, lr, cbs=[SparsifyCallback(*args, granularity=granularity, **kwargs), probe, *cbs])
    return probe.seen


def steps(schedule, target, epochs=3):
    "The sparsity after each batch"
    n = epochs*n_batches
    return [progress[schedule]((i+1)/n)*target for i in range(n)]


def assert_counts(seen, sparsities, context='global'):
    "After each batch, each pool has its exact number of silent groups"
    assert len(seen) == len(sparsities)
    for counts, s in zip(seen, sparsities):
        pools = [[c] for c in counts.values()] if context == 'local' else [list(counts.values())]
        for pool in pools:
            pruned, n = map(sum, zip(*pool))
            assert pruned == min(round(s*n), n-len(pool))


### 1. Exact

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('granularity', conv_axes)
def test_exact_groups(new_learner, granularity, context):
    seen = train(new_learner(), .8, granularity=granularity, context=context)
    assert_counts(seen, steps('one_cycle', .8), context)


@pytest.mark.parametrize('opt_func', [quick_sgd, adam], ids=['sgd', 'adam'])
@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('schedule', rising)
def test_exact_schedules(new_learner, schedule, opt_func, context):
    seen = train(new_learner(opt_func=opt_func), .9, schedule=schedule, context=context)
    assert_counts(seen, steps(schedule, .9), context)
    assert_counts(seen[-1:], [.9], context)


@pytest.mark.parametrize('granularity,default,other', [('weight', 'global', 'local'), ('kernel', 'local', 'global')])
def test_default_context(granularity, default, other):
    "All single weights compete, larger groups layer by layer"
    def pruned(*context):
        net = tiny_net()
        Sparsifier(net, granularity, *context).prune(.6)
        return n_zeros(net)
    assert pruned() == pruned(default) != pruned(other)


def test_exact_fastai_annealing(new_learner):
    assert_counts(train(new_learner(), .6, schedule=SchedCos(0, 1)), steps('cos', .6))


@pytest.mark.parametrize('context', ['local', 'global'])
def test_exact_ties(new_learner, context):
    "Equal weights that no step changes go one by one, the first first"
    net = tiny_net()
    for m in layers(net).values(): m.weight.data.fill_(.5)
    seen = train(new_learner(net), .7, lr=0., context=context)
    assert_counts(seen, steps('one_cycle', .7), context)
    first, *rest = [m.flatten() for m in zero_masks(net).values()]
    # in one pool the first layer is used up, but for the weight that it keeps
    pools = [first, *rest] if context == 'local' else [torch.cat([first[:-1], *rest])]
    for m in pools: assert not (m[1:] & ~m[:-1]).any()


@pytest.mark.parametrize('keys', [
    lambda net: dict(zip('038', (.5, .25, .9))),
    lambda net: {net[0]: .5, net[3]: .25, net[8]: .9},
    lambda net: {nn.Conv2d: .25, '0': .5, nn.Linear: .9}], ids=['names', 'modules', 'classes'])
def test_exact_dict(new_learner, keys):
    "Where entries overlap, a layer's own goes before its class's"
    net = tiny_net()
    seen = train(new_learner(net), keys(net))
    for name, s in zip('038', (.5, .25, .9)): assert_counts([{name: c[name]} for c in seen], steps('one_cycle', s))


def test_exact_dict_leaves_others_dense(new_learner):
    assert all(c['8'][0] == 0 for c in train(new_learner(), {nn.Conv2d: .5}))


def test_exact_dict_global(new_learner):
    "The layers of one entry compete among themselves"
    seen = train(new_learner(), {nn.Conv2d: .6, '8': .3}, context='global')
    convs = [{n: c[n] for n in '03'} for c in seen]
    assert_counts(convs, steps('one_cycle', .6), 'global')
    assert_counts([{'8': c['8']} for c in seen], steps('one_cycle', .3))
    assert convs[-1]['0'][0] != round(.6*convs[-1]['0'][1])


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('pattern,per_run', [('2:4', 2), ('1:4', 3), ('1:2', 1)])
def test_exact_pattern(new_learner, pattern, per_run, context):
    "Counts are exact on the way, and every run of m weights along the input channels has its zeros in the end"
    m = int(pattern[-1])
    learn, probe = new_learner(), Probe(partial(groups, granularity='weight'))
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(granularity=pattern, context=context), probe])
    assert_counts(probe.seen, steps('one_cycle', per_run/m), context)
    for mask in zero_masks(learn.model).values(): assert (mask.movedim(1, -1).unflatten(-1, (-1, m)).sum(-1) == per_run).all()


def test_exact_pattern_after_weights(new_learner):
    "A network that has lost whole runs of weights still ends in the pattern"
    learn = new_learner()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.9))
    learn.fit(1, 1e-2, cbs=SparsifyCallback(granularity='2:4', schedule='lin'))
    for mask in zero_masks(learn.model).values(): assert (mask.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


### The whole against a loop in plain PyTorch

def reference(model, epochs, target, context, lr=1e-2):
    "Train and prune along one-cycle, by a stable sort of all magnitudes, those that are pruned first"
    opt = torch.optim.SGD(model.parameters(), lr, momentum=.9, weight_decay=.01)
    ws = [m.weight for m in layers(model).values()]
    pruned = [torch.zeros_like(w, dtype=torch.bool) for w in ws]
    batches = list(tiny_dls().train)*epochs
    model.train()
    for i, (xb, yb) in enumerate(batches):
        nn.functional.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
        s = progress['one_cycle']((i+1)/len(batches))*target
        for pool in [[j] for j in range(len(ws))] if context == 'local' else [range(len(ws))]:
            score = torch.cat([ws[j].detach().abs().masked_fill(pruned[j], -1).flatten() for j in pool])
            mask = torch.zeros_like(score, dtype=torch.bool)
            mask[score.argsort(stable=True)[:round(s*len(score))]] = True
            for j, part in zip(pool, mask.split([ws[j].numel() for j in pool])): pruned[j] = part.view_as(ws[j])
        for w, g in zip(ws, pruned): w.data[g] = 0
    return model


@pytest.mark.parametrize('context', ['local', 'global'])
def test_same_as_plain_loop(new_learner, context):
    torch_sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, weight_decay=.01)
    learn = new_learner(opt_func=torch_sgd)
    learn.fit(3, 1e-2, cbs=SparsifyCallback(.9, context=context))
    assert_same(bits(learn.model), bits(reference(tiny_net(), 3, .9, context)))


### 2. The model stays the user's model

def anatomy(model):
    "What a module or a parameter is made of: classes, attributes, and the keys of all its dictionaries, hooks and buffers too"
    def parts(o): return {k: [*v] if isinstance(v, dict) else type(v) for k, v in vars(o).items()}
    return [(n, type(m), parts(m)) for n, m in model.named_modules()] + [(n, type(p), parts(p), p._backward_hooks) for n, p in model.named_parameters()]


@pytest.mark.parametrize('granularity', ['weight', 'filter', '2:4'])
def test_model_is_untouched(new_learner, granularity):
    "During and after a training, nothing is attached to the model"
    learn = new_learner()
    before, keys, probe = anatomy(learn.model), list(learn.model.state_dict()), Probe(anatomy)
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5, granularity=granularity), probe])
    assert len(probe.seen) == 2*n_batches and all(o == before for o in probe.seen + [anatomy(learn.model)])
    assert list(learn.model.state_dict()) == keys


def test_loads_into_plain_model(new_learner):
    learn = new_learner()
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.9))
    learn.save('pruned')
    plain = tiny_net()
    plain.load_state_dict(torch.load(learn.path/'models'/'pruned.pth', weights_only=False)['model'], strict=True)
    assert n_zeros(plain) == n_zeros(learn.model) and total(plain) == round(.9*n_weights)
    x, _ = tiny_data()
    assert torch.equal(plain.eval()(x), learn.model.eval()(x))


@pytest.mark.filterwarnings('ignore::UserWarning')  # `load_learner` warns of pickles
def test_export(item_learner):
    "The exported learner predicts as the one in memory, and is as sparse"
    learn = item_learner()
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.9, context='global'))
    learn.export('learner.pkl')
    other = load_learner(learn.path/'learner.pkl')
    assert n_zeros(other.model) == n_zeros(learn.model) and total(other.model) == round(.9*n_weights)
    with other.no_bar(): assert torch.equal(other.predict(3)[2], learn.predict(3)[2])


@pytest.mark.filterwarnings('ignore::UserWarning')  # `load_learner` warns of pickles
def test_export_with_callback(item_learner):
    "A callback that stays on the learner travels with it, and can train there"
    learn = item_learner(cbs=SparsifyCallback(.9))
    learn.fit(1, 1e-2)
    learn.export('learner.pkl')
    other = load_learner(learn.path/'learner.pkl')
    assert torch.equal(other.predict(3)[2], learn.predict(3)[2])
    other.dls = learn.dls
    other.fit(1, 1e-2)
    assert total(other.model) == round(.9*n_weights)


### 3. What is pruned stays pruned

@pytest.mark.parametrize('schedule', rising)
def test_masks_only_grow(new_learner, schedule):
    probe = Probe(zero_masks)
    new_learner(opt_func=adam).fit(3, 1e-2, cbs=[SparsifyCallback(.9, schedule=schedule), probe])
    for a, b in zip(probe.seen, probe.seen[1:]):
        for n in a: assert not (a[n] & ~b[n]).any()


@pytest.mark.parametrize('opt_func', [quick_sgd, adam], ids=['sgd', 'adam'])
def test_forward_sees_pruned_weights(new_learner, opt_func):
    "Momentum and weight decay never let a weight back into a forward pass"
    probe = Probe(n_zeros)
    seen = []
    spy = Callback(before_batch=lambda self: seen.append(n_zeros(self.model)) if self.training else None)
    new_learner(opt_func=opt_func).fit(3, 1e-2, cbs=[SparsifyCallback(.9), probe, spy])
    assert seen[1:] == probe.seen[:-1] and all(seen[-1].values())


def test_validation_sees_pruned_weights(new_learner):
    train_probe, valid_probe = Probe(n_zeros), Probe(n_zeros, when='valid')
    new_learner().fit(3, 1e-2, cbs=[SparsifyCallback(.9), train_probe, valid_probe])
    ends = train_probe.seen[n_batches-1::n_batches]
    assert valid_probe.seen == [o for o in ends for _ in range(2)]
    assert ends[0] != ends[1] != ends[2]


@pytest.mark.parametrize('n_acc', [8, 16, 24, 1000])
def test_gradient_accumulation(new_learner, n_acc):
    "Batches without a step, also where an epoch does not divide into them, take their share of the schedule"
    seen = train(new_learner(), .9, cbs=[GradientAccumulation(n_acc)])
    assert_counts(seen, steps('one_cycle', .9))


def test_cancelled_steps(new_learner):
    "A step that another callback skips, as a mixed precision that overflows"
    def skip(self):
        if self.iter % 2: raise CancelStepException
    assert_counts(train(new_learner(), .9, cbs=[Callback(before_step=skip)]), steps('one_cycle', .9))


@pytest.mark.parametrize('context', ['local', 'global'])
def test_dsd_gives_back(new_learner, context):
    "On the way down counts are exact too, and in the end no weight is zero"
    seen = train(new_learner(), .8, context=context, schedule='dsd', epochs=4)
    assert_counts(seen, steps('dsd', .8, epochs=4), context)
    assert [sum(pruned for pruned, _ in seen[i].values()) for i in (9, 19)] == [1203, 0]


### 4. Resumes from an ordinary checkpoint

@pytest.mark.parametrize('kwargs', [{}, dict(context='global'), dict(granularity='filter'), dict(granularity='2:4', sparsity=.5),
    dict(granularity='kernel', layers=nn.Conv2d), dict(schedule='iterative'), dict(schedule='dsd'), dict(sparsity={nn.Conv2d: .9, '8': .5})], ids=str)
@pytest.mark.parametrize('opt_func', [quick_sgd, adam], ids=['sgd', 'adam'])
def test_resume(new_learner, kwargs, opt_func):
    kwargs = dict(sparsity=.9) | kwargs
    whole = new_learner(opt_func=opt_func)
    save = SaveModelCallback(every_epoch=True, with_opt=True)
    whole.fit_one_cycle(4, 1e-2, cbs=[SparsifyCallback(**kwargs), save])
    for start in (1, 3):
        rest, cb = new_learner(opt_func=opt_func), SparsifyCallback(**kwargs)
        rest.load(f'model_{start-1}', with_opt=True, weights_only=False)
        rest.fit_one_cycle(4, 1e-2, start_epoch=start, cbs=cb)
        assert_same(bits(rest.model), bits(whole.model))
        assert rest.recorder.sparsities == whole.recorder.sparsities[start*n_batches:]


def test_resume_masks(new_learner):
    "The masks too, which decide over the batches to come"
    first, second = SparsifyCallback(.9), SparsifyCallback(.9)
    learn = new_learner()
    learn.fit(4, 1e-2, cbs=[first, Callback(after_epoch=lambda self: self.save('half') if self.epoch == 1 else None)])
    other = new_learner().load('half', weights_only=False)
    other.fit(4, 1e-2, start_epoch=2, cbs=second)
    assert_same(first.sparsifier.masks, second.sparsifier.masks)


### 5. No layer dies

@pytest.mark.parametrize('sparsity', [.99, .995])
def test_no_layer_dies_globally(new_learner, sparsity):
    "A layer with by far the smallest weights keeps one, and the total is exact all the same"
    net = tiny_net()
    net[3].weight.data *= 1e-6
    seen = train(new_learner(net), sparsity, lr=1e-9, context='global')
    assert_counts(seen, steps('one_cycle', sparsity), 'global')
    assert seen[-1]['3'] == (16*8*9 - 1, 16*8*9)


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_sparsity_one_keeps_one(new_learner, granularity, context):
    with pytest.warns(UserWarning, match='One group of each layer is kept'):
        seen = train(new_learner(), 1, granularity=granularity, context=context)
    assert all(pruned == n-1 for pruned, n in seen[-1].values())


def test_small_layer_keeps_one(new_learner):
    "Rounding would take all three weights of the last layer"
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3), nn.Linear(3, 1), nn.Linear(1, 4))
    with pytest.warns(UserWarning, match='^2: 0.9 of 3 would leave'):
        seen = train(new_learner(net), {'1': .9, '2': .9, '3': .5})
    assert seen[-1] == {'1': (round(.9*432), 432), '2': (2, 3), '3': (2, 4)}


### 6. In place

def test_in_place(new_learner):
    "Parameters are the same objects, in the same memory, in the same layout"
    net = tiny_net().to(memory_format=torch.channels_last)
    place = lambda m: [(id(p), p.data_ptr(), p.stride()) for p in m.parameters()]
    before, probe = place(net), Probe(place)
    learn = new_learner(net)
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5), probe])
    assert all(o == before for o in probe.seen) and len(probe.seen) == 2*n_batches
    assert net[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert total(net) == round(.5*n_weights)


@pytest.mark.parametrize('granularity', conv_axes)
def test_channels_last_prunes_alike(new_learner, granularity):
    nets = [tiny_net(), tiny_net().to(memory_format=torch.channels_last)]
    for net in nets: Sparsifier(net, granularity).prune(.6)
    assert_same(*map(bits, nets))
    assert any(n_zeros(nets[1]).values())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('context', ['local', 'global'])
def test_dtypes(dtype, context):
    "The lowest in the weights' own precision go, of equals the first"
    net = tiny_net().to(dtype)
    ws = [m.weight for m in layers(net).values()]
    pools = [[w] for w in ws] if context == 'local' else [ws]
    flat = [torch.cat([w.detach().abs().flatten() for w in p]) for p in pools]
    lowest = [f.double().argsort(stable=True)[:round(.7*len(f))].sort().values for f in flat]
    Sparsifier(net, context=context).prune(.7)
    for p, l in zip(pools, lowest): assert torch.equal(torch.cat([w.flatten() for w in p]).eq(0).nonzero().squeeze(1), l)
    assert all(w.dtype == dtype for w in ws)


### The training table

@pytest.mark.parametrize('recorder', [{}, dict(add_time=False), dict(train_metrics=True), dict(train_metrics=True, valid_metrics=False)], ids=str)
def test_column(new_learner, recorder):
    "Names and values stand in one order, with the column after the metrics"
    learn = new_learner(metrics=[accuracy])
    learn.remove_cb(Recorder).add_cb(Recorder(**recorder))
    logged = []
    learn.logger = logged.append
    learn.fit(3, 1e-2, cbs=SparsifyCallback(.9))
    names = learn.recorder.metric_names
    at = names.index('sparsity')
    assert names[at+1:] == (['time'] if recorder.get('add_time', True) else [])
    ends = [round(s*n_weights)/n_weights for s in steps('one_cycle', .9)[n_batches-1::n_batches]]
    assert [len(row) for row in logged] == [len(names)]*3
    assert [row[at] for row in logged] == pytest.approx(ends, abs=2e-3)
    assert [v[at-1] for v in learn.recorder.values] == [row[at] for row in logged]
    assert logged[-1][at] == total(learn.model) / n_weights
    assert all(0 <= row[names.index(n)] <= 1 for row in logged for n in names if 'accuracy' in n)


def test_csv(new_learner):
    learn = new_learner(metrics=accuracy)
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.9), CSVLogger()])
    df = CSVLogger.read_log(type('', (), dict(path=learn.path, fname='history.csv')))
    assert list(df) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'time']
    assert df.sparsity.iloc[-1] == learn.recorder.values[-1][3] == total(learn.model) / n_weights
    assert df.accuracy.between(0, 1).all() and df.epoch.tolist() == [0, 1]


@pytest.mark.parametrize('monitor', ['sparsity', 'accuracy', 'valid_loss'])
def test_tracker(new_learner, monitor):
    learn = new_learner(metrics=accuracy)
    tracker = TrackerCallback(monitor)
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(.9), tracker])
    values = [v[['train_loss', 'valid_loss', 'accuracy', 'sparsity'].index(monitor)] for v in learn.recorder.values]
    assert tracker.best == (min if 'loss' in monitor else max)(values)


def test_save_best_sparsity(new_learner):
    "The sparsest is the last, so that it is what is loaded in the end"
    learn = new_learner()
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(.9), SaveModelCallback(monitor='sparsity', with_opt=True)])
    assert total(learn.model) == round(.9*n_weights)


### The learner in daily use

def test_sparsity_zero_is_dense(new_learner):
    dense, pruned = new_learner(opt_func=adam), new_learner(opt_func=adam)
    dense.fit_one_cycle(2, 1e-2)
    pruned.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback(0))
    assert_same(bits(dense.model), bits(pruned.model))
    assert pruned.recorder.metric_names.index('sparsity') == 3 and pruned.recorder.values[-1][2] == 0


@pytest.mark.parametrize('cbs', [(), (partial(TrackerCallback, 'sparsity'),)], ids=['alone', 'monitored'])
def test_lr_find(new_learner, cbs):
    "The search neither prunes nor changes the model, and pruning works after it"
    learn, probe = new_learner(cbs=[SparsifyCallback(.9), *(o() for o in cbs)]), Probe(n_zeros)
    before = bits(learn.model)
    learn.add_cb(probe)
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False, suggest_funcs=())
    assert_same(before, bits(learn.model))
    assert len(probe.seen) >= 5 and not any(z for o in probe.seen for z in o.values())
    learn.fit(1, 1e-2)
    assert total(learn.model) == round(.9*n_weights)


def test_validate(new_learner):
    learn = new_learner(metrics=accuracy)
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.9))
    before, without = bits(learn.model), learn.validate()
    learn.add_cb(SparsifyCallback(.5))
    assert list(learn.validate()) == list(without) and len(without) == 2
    assert_same(before, bits(learn.model))


def test_sparsities_stay(new_learner):
    "What happened in a training can be looked at after a validation"
    learn = new_learner(cbs=SparsifyCallback(.9))
    learn.fit(2, 1e-2)
    before = list(learn.recorder.sparsities)
    learn.validate()
    assert learn.recorder.sparsities == before and len(before) == 2*n_batches


def test_get_preds(new_learner):
    learn = new_learner()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.9))
    before, without = bits(learn.model), learn.get_preds(with_loss=True)
    learn.add_cb(SparsifyCallback(.5))
    for a, b in zip(learn.get_preds(with_loss=True), without, strict=True): assert torch.equal(a, b)
    assert_same(before, bits(learn.model))


def test_predict(item_learner):
    learn = item_learner(cbs=SparsifyCallback(.9))
    learn.fit(1, 1e-2)
    before, (*_, out) = bits(learn.model), learn.predict(3)
    assert torch.allclose(out, learn.model.eval()(tiny_data()[0][3:4])[0], atol=1e-6)
    assert_same(before, bits(learn.model))


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('first,second', [(.9, .5), (.3, .8)])
def test_second_fit(new_learner, first, second, context):
    learn = new_learner()
    for s in first, second: assert_counts(train(learn, s, context=context)[-1:], [s], context)


def test_same_callback_twice(new_learner):
    "A callback holds nothing of an earlier training"
    learn, cb = new_learner(), SparsifyCallback(.9)
    learn.fit(1, 1e-2, cbs=cb)
    other = new_learner()
    other.fit(2, 1e-2, cbs=cb)
    fresh = new_learner()
    fresh.fit(2, 1e-2, cbs=SparsifyCallback(.9))
    assert_same(bits(other.model), bits(fresh.model))


def test_on_learner_or_in_fit(new_learner):
    "Where the callback is given makes no difference"
    on, at = new_learner(cbs=SparsifyCallback(.9)), new_learner()
    on.fit(2, 1e-2)
    at.fit(2, 1e-2, cbs=SparsifyCallback(.9))
    assert_same(bits(on.model), bits(at.model))
    assert on.recorder.sparsities == at.recorder.sparsities and len(on.recorder.sparsities) == 2*n_batches


def test_without_recorder(new_learner):
    learn = new_learner(default_cbs=False, cbs=TrainEvalCallback)
    assert_counts(train(learn, .9), steps('one_cycle', .9))


@pytest.mark.parametrize('context', ['local', 'global'])
def test_plain_loop(context):
    "`Sparsifier` in a loop of one's own"
    net = tiny_net()
    opt, sp = torch.optim.SGD(net.parameters(), 1e-2, momentum=.9, weight_decay=.01), Sparsifier(net, context=context)
    for i, (xb, yb) in enumerate(batches := list(tiny_dls().train)*2):
        nn.functional.cross_entropy(net(xb), yb).backward()
        opt.step()
        share = sp.prune(s := .9*(i+1)/len(batches))
        opt.zero_grad()
        assert_counts([groups(net, 'weight')], [s], context)
        assert share == total(net)/n_weights
    assert_same(sp.masks, {n: m.weight != 0 for n, m in layers(net).items()})


### What falls silent, and what is left alone

def test_filters_silence_their_channel(new_learner):
    "Bias and batch norm go with a filter, so that nothing comes through"
    learn = new_learner()
    def silenced(model): return [int(((m.bias == 0) & (bn.weight == 0) & (bn.bias == 0)).sum()) for m, bn in (model[:2], model[3:5])]
    probe = Probe(silenced)
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(.75, granularity='filter'), probe])
    assert probe.seen[-1] == [6, 12]
    assert probe.seen == [[round(s*8), round(s*16)] for s in steps('one_cycle', .75)]
    x, net = tiny_data()[0], learn.model.eval()
    for i in (1, 4):
        dead = silent(net[i-1], 'filter')
        out = net[:i+1](x)
        assert (out[:, dead] == 0).all() and (out[:, ~dead] != 0).any()


def test_frozen_layers(new_learner):
    net = tiny_net()
    net[0].requires_grad_(False)
    before = bits(net[0])
    with pytest.warns(UserWarning, match='Frozen layers are not pruned: 0'): seen = train(new_learner(net), .9)
    assert_same(before, bits(net[0]))
    assert_counts([{n: c[n] for n in '38'} for c in seen], steps('one_cycle', .9))


@pytest.mark.parametrize('choice,chosen', [(nn.Linear, '8'), ('3', '3'), (['0', nn.Linear], '08'), (lambda m: m.weight.numel() > 1000, '3')],
    ids=['class', 'name', 'list', 'function'])
def test_layers(new_learner, choice, chosen):
    "Only the chosen are pruned"
    seen = train(new_learner(), .9, layers=choice)
    assert_counts([{n: c[n] for n in chosen} for c in seen], steps('one_cycle', .9))
    assert all(c[n][0] == 0 for c in seen for n in c if n not in chosen)
