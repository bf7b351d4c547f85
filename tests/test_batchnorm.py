"""The running statistics of norms belong to the weights that are left, and nothing else changes.

The expected statistics are averages of what each norm is given, computed here without the package."""
from copy import deepcopy
from functools import partial

import pytest, torch
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
    CancelTrainException, DataLoader, DataLoaders, Learner, get_random_states, params, set_seed)
from fastai.callback.all import BnFreeze, GradientAccumulation, SaveModelCallback
from fastai.vision.gan import FixedGANSwitcher, GANLearner
from onecycle_prune.batchnorm import estimate_batchnorms
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.experiments.common import BFloat16
from onecycle_prune.layers import unwrap_model
from torch import nn
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.modules.batchnorm import _NormBase

from helpers import assert_same, before_training_batches, bits
from networks import silence, tiny_data, tiny_net
from reference import total_zeros

area = 'Batch-norm statistics'
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


### What is asserted

def norms_of(net): return {n: m for n, m in unwrap_model(net).named_modules() if isinstance(m, _NormBase)}


def stats(net):
    "A copy of all running statistics: {name of the norm: (mean, variance)}"
    return {n: (m.running_mean.clone(), m.running_var.clone())
        for n, m in norms_of(net).items() if m.running_mean is not None}


def as_used(net, batches):
    """The statistics that the norms should have: of each norm's input, averaged over batches, dropout off

    Norms normalize by the batch here, by a forward that is not theirs, so none of them changes. A channel that is
    constant has its squared mean for its variance."""
    seen = {n: [] for n in norms_of(net)}
    def normalize(name):
        def forward(x):
            m = norms_of(net)[name]
            per_item = isinstance(m, nn.modules.instancenorm._InstanceNorm)
            axes = [d for d in range(x.dim()) if d > 1 or (d == 0 and not per_item)]
            mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True)
            to_channel = (lambda t: t.mean(0).flatten()) if per_item else torch.flatten
            seen[name].append((to_channel(mean), to_channel(var)))
            y = (x - mean)/(x.var(axes, keepdim=True, unbiased=False) + m.eps).sqrt()
            if m.weight is None: return y
            shape = [1, -1] + [1]*(x.dim()-2)
            return y*m.weight.view(shape) + m.bias.view(shape)
        return forward
    was = net.training
    net.eval()
    for n, m in norms_of(net).items(): m.forward = normalize(n)
    with torch.no_grad():
        for xb in batches: unwrap_model(net)(*xb)
    for m in norms_of(net).values(): del m.forward
    net.train(was)
    averages = {n: [torch.stack(o).mean(0) for o in zip(*s)] for n, s in seen.items() if s}
    return {n: (mean, var.where(var >= norms_of(net)[n].eps/1000, mean**2)) for n, (mean, var) in averages.items()}


class Batches(Callback):
    "Copies of the inputs of the training batches of the last epoch"
    run_valid = False
    def before_train(self): self.seen = []
    def before_batch(self): self.seen.append(tuple(x.clone() for x in self.xb))


def train(learn, sparsity=.9, epochs=2, lr=1e-2, cbs=(), **kwargs):
    "Train with pruning, and return the inputs of the last epoch's batches"
    batches = Batches()
    learn.fit(epochs, lr, cbs=[SparsifyCallback(sparsity, **kwargs), batches, *cbs])
    return batches.seen


def assert_estimated(net, batches, names=None):
    "The norms `names`, by default all, have the averages over `batches` of what they are given"
    found, expected = stats(net), as_used(net, batches)
    for n in found if names is None else names: close(found[n], expected[n])


def data(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def norm_net(norm):
    "A small network with dropout and two norms, made by the function `norm` of the number of channels"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), norm(8), nn.Dropout(.5), nn.Conv2d(8, 16, 3), norm(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


kinds = pytest.mark.parametrize('norm', [nn.BatchNorm2d, partial(nn.BatchNorm2d, momentum=None),
    partial(nn.BatchNorm2d, affine=False), partial(nn.InstanceNorm2d, track_running_stats=True),
    partial(nn.InstanceNorm2d, affine=True, momentum=.3, track_running_stats=True)],
    ids=['batch', 'cumulative', 'not affine', 'instance', 'affine instance'])


### After a training

@kinds
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_end_of_training(new_learner, norm, granularity):
    "The statistics are averages over the last epoch's batches, for the weights that are left"
    learn = new_learner(norm_net(norm))
    momenta = [m.momentum for m in norms_of(learn.model).values()]
    batches = train(learn, .75, granularity=granularity)
    assert len(batches) == 5
    assert_estimated(learn.model, batches)
    assert [m.momentum for m in norms_of(learn.model).values()] == momenta


@pytest.mark.parametrize('n', [1, 3])
def test_number_of_batches(new_learner, n):
    "`bn_batches` is the number of latest batches"
    learn = new_learner()
    assert_estimated(learn.model, train(learn, bn_batches=n)[-n:])


def test_each_validation(new_learner):
    "A validation sees statistics of the weights as they are then, in each epoch"
    learn, batches, errors = new_learner(), Batches(), []
    def compare(self):
        expected = as_used(self.model, batches.seen)
        errors.append(max((a-b).abs().max().item() for n, s in stats(self.model).items()
            for a, b in zip(s, expected[n])))
    learn.fit(3, .1, cbs=[SparsifyCallback(.9), batches, Callback(before_validate=compare)])
    assert len(errors) == 3 and max(errors) < 1e-4


def test_validation_before_pruning(new_learner):
    "An epoch without pruning has the statistics of an ordinary training"
    seen = {}
    for n in (0, 12):
        learn, seen[n] = new_learner(), []
        note = Callback(before_validate=lambda self, n=n: seen[n].append(stats(self.model)))
        learn.fit(4, .1, cbs=[SparsifyCallback(.9, schedule='one_shot', bn_batches=n), note])
    assert_same(seen[0][0], seen[12][0])
    with pytest.raises(AssertionError): assert_same(seen[0][3], seen[12][3])


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, partial(nn.BatchNorm2d, affine=False)], ids=['affine', 'not affine'])
def test_loss(norm):
    "A network that is pruned in its last batches has the same loss in evaluation and in training mode"
    y = torch.arange(640)%4
    x = data(640, 4, 6, 6) + nn.functional.one_hot(y, 4)[:, :, None, None] + 2
    def gap(bn_batches):
        net = norm_net(norm)
        net[2].p = 0.
        dls = DataLoaders(*[DataLoader(list(zip(x, y)), bs=64)]*2)
        learn = silence(Learner(dls, net, nn.CrossEntropyLoss()))
        learn.fit(2, 3e-3, cbs=SparsifyCallback(.9, schedule=lambda pos: float(pos > .95), bn_batches=bn_batches))
        valid_loss = learn.validate()[0]
        net.train()
        losses = [learn.loss_func(net(xb), yb).item() for xb, yb in dls.train]
        return abs(valid_loss - sum(losses)/10)
    assert gap(12) < .02 < gap(0)


### Nothing else changes

@pytest.mark.parametrize('n_acc', [None, 16])
def test_same_weights(new_learner, n_acc):
    "Weights, random numbers and the order of the batches are those of a training without an estimate, bit for bit"
    class Noise(nn.Module):
        def forward(self, x): return x + .1*torch.randn_like(x)  # in evaluation too
    ends = []
    for n in (0, 12):
        learn = new_learner(nn.Sequential(norm_net(nn.BatchNorm2d), Noise()))
        learn.dls = DataLoaders(DataLoader(list(zip(*tiny_data())), bs=8, shuffle=True), learn.dls.valid)
        learn.dls.train.rng.seed(0)
        set_seed(1)
        batches = train(learn, epochs=3, cbs=[GradientAccumulation(n_acc)] if n_acc else [], bn_batches=n)
        weights = dict(learn.model.named_parameters())
        ends.append([weights, batches, get_random_states(), learn.dls.train.rng.getstate()])
        if n: assert_estimated(learn.model, batches)
    assert_same(*[e[0] for e in ends])
    assert_same(*[e[1] for e in ends])
    assert repr(ends[0][2:]) == repr(ends[1][2:])


def test_modes_and_buffers(new_learner):
    "Modules keep their modes; buffers that are no statistics keep their values, though evaluation writes them"
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.zeros(()))
            self.register_buffer('latest', torch.zeros(1))
        def forward(self, x):
            self.n += 1
            self.latest = x.detach().mean().reshape(1)
            return x
    learn = new_learner(nn.Sequential(norm_net(nn.BatchNorm2d), Counter()))
    learn.model[0][2].eval()
    modes = {n: m.training for n, m in learn.model.named_modules()}
    latest = learn.model[1].latest
    assert estimate_batchnorms(learn, n_batches=3) == 2
    assert {n: m.training for n, m in learn.model.named_modules()} == modes
    assert learn.model[1].n == 0 and learn.model[1].latest is latest
    train(learn, cbs=[before_training_batches(lambda learn: learn.model[1].n.zero_())])
    assert learn.model[1].n == 1 + 2  # the last batch of the training, and two of the validation


def test_no_validation_data_and_no_norms(new_learner):
    "A model without running statistics is called no more often than without an estimate"
    calls = []
    class Count(nn.Module):
        def forward(self, x):
            calls.append(self.training)
            return x
    for net in (tiny_net()[:1], norm_net(partial(nn.BatchNorm2d, track_running_stats=False)),
                norm_net(nn.InstanceNorm2d), norm_net(partial(nn.GroupNorm, 4))):
        calls.clear()
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))
        if len(net) > 1: head = nn.Identity()
        model = nn.Sequential(Count(), net, head)
        model(data(2, 4, 6, 6))
        calls.clear()
        learn = new_learner(model)
        train(learn)
        assert len(calls) == 1 + 2*(5+2) # the sparsifier observes one
        calls.clear()
        assert estimate_batchnorms(learn) == 0 and not calls


def test_references_only(new_learner):
    "The callback keeps the inputs themselves, not more than it needs, and none after the training"
    class Look(Callback):
        order, run_valid = SparsifyCallback.order+1, False
        def before_batch(self):
            kept = [o for o, _ in self.learn.sparsify.latest_batches.batches]
            assert kept[-1] is self.xb and len(kept) <= 3
    learn = new_learner()
    cb = SparsifyCallback(.9, bn_batches=3)
    learn.fit(2, 1e-2, cbs=[cb, Look()])
    assert cb.latest_batches is None


### Norms that are left alone

def test_frozen_by_fastai(new_learner):
    "`train_bn=False`: frozen norms have the statistics of an ordinary training, and the others are estimated"
    ends = []
    for n in (0, 12):
        learn = new_learner(norm_net(nn.BatchNorm2d), train_bn=False,
            splitter=lambda m: [params(m[:3]), params(m[3:])])
        learn.freeze()
        train(learn, bn_batches=n, layers=['3', '8'])
        ends.append(stats(learn.model))
    assert_same(ends[0]['1'], ends[1]['1'])
    assert_differ(ends[0]['4'], ends[1]['4'])


def assert_differ(a, b):
    with pytest.raises(AssertionError): assert_same(a, b)


@pytest.mark.parametrize('freeze', ['BnFreeze', 'eval'])
def test_frozen_in_evaluation_mode(new_learner, freeze):
    "Norms that train in evaluation mode keep their statistics, bit for bit"
    learn = new_learner(norm_net(nn.BatchNorm2d))
    before = stats(learn.model)
    if freeze == 'BnFreeze': learn.model[1].requires_grad_(False)
    class Eval(Callback):
        def before_train(self): self.model[1].eval()
    train(learn, cbs=[BnFreeze() if freeze == 'BnFreeze' else Eval()])
    assert_same(stats(learn.model)['1'], before['1'])
    assert_differ(stats(learn.model)['4'], before['4'])


def test_unused_norm(new_learner):
    "A norm that no batch reaches keeps its statistics and its count"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.unused = norm_net(nn.BatchNorm2d), nn.BatchNorm2d(3)
        def forward(self, x): return self.net(x)
    net = Net()
    with torch.no_grad(): net.unused(5 + data(8, 3, 2, 2))
    before = bits(net.unused)
    learn = new_learner(net)
    batches = train(learn)
    assert_same(bits(net.unused), before)
    assert_estimated(net, batches, ['net.1', 'net.4'])


### Other kinds of models and inputs

def test_several_inputs(new_learner):
    "A batch with two inputs, and a norm that two branches share"
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = norm_net(nn.BatchNorm2d)
        def forward(self, a, b): return self.net(a) - self.net(b)
    x, y = tiny_data()
    items = list(zip(x, 2*x.flip(0) + 1, y))
    learn = new_learner(Siamese())
    learn.dls = DataLoaders(DataLoader(items[:32], bs=8), DataLoader(items[32:], bs=8))
    learn.dls.train.n_inp = learn.dls.valid.n_inp = 2
    batches = train(learn)
    assert len(batches[0]) == 2
    assert_estimated(learn.model, batches)
    learn.model.net[1].running_mean.fill_(7.)
    estimate_batchnorms(learn)
    assert_estimated(learn.model, batches)
    learn.model.net[1].running_mean.fill_(7.)
    estimate_batchnorms(learn.model, items_of(learn), n_inp=2)
    assert_estimated(learn.model, batches)


def items_of(learn): return list(learn.dls.train)


def test_input_changed_in_place(new_learner):
    "A model that changes its input: batches that it has changed are not used again"
    class Shift(nn.Module):
        def forward(self, x): return x.add_(1)
    net = nn.Sequential(Shift(), norm_net(nn.BatchNorm2d))
    ends = []
    for n in (0, 12):
        learn = new_learner(nn.Sequential(Shift(), norm_net(nn.BatchNorm2d)))
        train(learn, bn_batches=n)
        ends.append(bits(learn.model))
    assert_same(*ends)
    # The function takes new batches.
    estimate_batchnorms(net, [data(8, 4, 6, 6), 1 + data(8, 4, 6, 6)])
    assert_estimated(net, [(data(8, 4, 6, 6),), (1 + data(8, 4, 6, 6),)])


@pytest.mark.parametrize('switch_eval', [False, True])
@pytest.mark.parametrize('n_crit', [1, 2, 3])
def test_gan(n_crit, switch_eval):
    "The norms of a GAN's generator belong to its weights, whichever network trains last"
    torch.manual_seed(0)
    conv = partial(nn.Conv2d, kernel_size=3, padding=1)
    generator = nn.Sequential(conv(4, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
    critic = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 1), nn.Flatten(0))
    x = data(48, 4, 6, 6)
    items = list(zip(x, x+1))
    dls = DataLoaders(DataLoader(items[:40], bs=8), DataLoader(items[40:], bs=8))
    learn = silence(GANLearner.wgan(dls, generator, critic, switch_eval=switch_eval,
        switcher=FixedGANSwitcher(n_crit, 1)))
    seen, ends = [], []
    note = before_training_batches(lambda learn: seen.append(learn.xb) if learn.model.gen_mode else None)
    # With `switch_eval`, fastai validates in training mode, which changes the statistics.
    end = Callback(before_validate=lambda self: ends.append(deepcopy(self.model.generator)))
    end.order = -99
    learn.fit(1, 1e-3, cbs=[SparsifyCallback(.8), note, end])
    assert seen
    assert_estimated(ends[0], seen)


@pytest.mark.parametrize('frozen', [False, True])
def test_fused_batchnorm(new_learner, frozen):
    "A convolution of torch.ao with its batch norm inside: pruning works, and so do observers and freezing"
    # Its training depends on the statistics, so the weights are the same in the first epoch only.
    ends = []
    for n in (0, 12):
        torch.manual_seed(0)
        fused = qat.ConvBn2d(4, 8, 3, qconfig=get_default_qat_qconfig('x86'))
        if frozen: fused.freeze_bn_stats()
        learn = new_learner(nn.Sequential(fused, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
        train(learn, epochs=1, bn_batches=n, layers=[nn.Linear])
        ends.append((dict(learn.model.named_parameters()), stats(learn.model)))
    assert_same(ends[0][0], ends[1][0])
    if frozen: assert_same(ends[0][1], ends[1][1])
    else: assert_differ(ends[0][1], ends[1][1])


@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile], ids=['DataParallel', 'compile'])
def test_wrapped(new_learner, wrap):
    "A model in a wrapper; the wrapped one is not compiled for the estimate"
    learn = new_learner(norm_net(nn.BatchNorm2d))
    learn.model = wrap(learn.model, **({} if wrap is nn.DataParallel else dict(backend='eager')))
    batches = train(learn)
    assert_estimated(learn.model, batches)


class Autocast(Callback):
    "Mixed precision on the CPU, as fastai's `MixedPrecision` has it on a GPU"
    order = 10
    def before_batch(self):
        self.context = torch.autocast('cpu', torch.bfloat16)
        self.context.__enter__()
    def after_loss(self): self.context.__exit__(None, None, None)
    def after_pred(self): self.learn.pred = self.pred.float()


def test_mixed_precision(new_learner):
    "The estimate runs in the precision of the training"
    learn, dtypes = new_learner(norm_net(nn.BatchNorm2d)), []
    hook = learn.model[0].register_forward_hook(
        lambda m, inp, out: dtypes.append((learn.model.training, out.dtype)))
    batches = train(learn, cbs=[Autocast()])
    hook.remove()
    assert {d for training, d in dtypes if not training} == {torch.bfloat16}
    assert learn.model[1].running_mean.dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16): expected = as_used(learn.model, batches)
    for n, s in stats(learn.model).items(): close(s, expected[n], rtol=.05, atol=.02, check_dtype=False)


### Trainings that stop

class Stop(Callback):
    "Raise `error` in the middle of the second epoch"
    order, run_valid = SparsifyCallback.order+2, False
    def __init__(self, error, event): self.error, self.event = error, event
    def __call__(self, event):
        if event == self.event and self.epoch == 1 and self.iter == 2: raise self.error
        return super().__call__(event)


errors = pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError, CancelFitException, CancelEpochException,
    CancelTrainException, CancelBatchException])


@errors
@pytest.mark.parametrize('event', ['after_pred', 'after_step'])
@pytest.mark.filterwarnings('ignore:The training ended early')
def test_interrupted(new_learner, error, event):
    "However a training stops, its statistics belong to its last weights"
    learn, batches = new_learner(norm_net(nn.BatchNorm2d)), []
    note = before_training_batches(lambda learn: batches.append(tuple(x.clone() for x in learn.xb)))
    try: learn.fit(2, .1, cbs=[SparsifyCallback(.9, schedule='lin'), note, Stop(error, event)])
    except (KeyboardInterrupt, RuntimeError): pass
    ended = error in (CancelTrainException, CancelBatchException)  # the epoch ends as usual
    assert_estimated(learn.model, batches[5:] if ended else batches)
    assert total_zeros(learn.model) > 0


def test_error_in_the_estimate(new_learner):
    "If the estimate fails too, the first error is raised, and the statistics stay"
    class Broken(nn.Module):
        is_broken = False
        def forward(self, x):
            if self.is_broken: raise RuntimeError('broken for good')
            return x
    learn = new_learner(nn.Sequential(norm_net(nn.BatchNorm2d), Broken()))
    def stop(self):
        if self.epoch == 1:
            learn.model[1].is_broken = True
            self.before = stats(learn.model)
            raise ZeroDivisionError('stop')
    cb = Callback(after_step=stop)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match='ended early'):
        learn.fit(2, .1, cbs=[SparsifyCallback(.9), cb])
    assert_same(stats(learn.model), cb.before)
    learn.model[1].is_broken = True
    modes = [m.training for m in learn.model.modules()]
    with pytest.raises(RuntimeError, match='for good'): estimate_batchnorms(learn)
    assert_same(stats(learn.model), cb.before)
    assert [m.training for m in learn.model.modules()] == modes
    assert [m.momentum for m in norms_of(learn.model).values()] == [.1, .1]


def test_resume(new_learner, tmp_path):
    "A training that resumes ends with the same statistics, bit for bit, where an epoch has fewer batches than are kept"
    def fit(learn, **kwargs):
        learn.fit(4, .1, cbs=[SparsifyCallback(.9), SaveModelCallback(every_epoch=True, with_opt=True)], **kwargs)
        return bits(learn.model)
    whole = fit(new_learner())
    learn = new_learner()
    learn.load('model_1', with_opt=True)
    assert_same(fit(learn, start_epoch=2), whole)


def test_exported(item_learner, tmp_path):
    "The statistics are in the exported learner, and in a checkpoint"
    learn = item_learner()
    learn.fit(2, .1, cbs=SparsifyCallback(.9))
    learn.save('end')
    learn.export('learner.pkl')
    other = item_learner().load('end')
    assert_same(bits(other.model), bits(learn.model))
    assert estimate_batchnorms(other, n_batches=4) == 2


### Two callbacks

def test_two_callbacks(new_learner):
    "With a callback for each part, the statistics are those of the whole"
    learn, batches = new_learner(norm_net(nn.BatchNorm2d)), Batches()
    learn.fit(2, .1, cbs=[SparsifyCallback(.9, layers='0'), SparsifyCallback(.5, layers=['3', '8']), batches])
    assert_estimated(learn.model, batches.seen)


### The function

@pytest.mark.parametrize('make', [
    lambda x: list(x.split(8)),
    lambda x: [(b, torch.zeros(8)) for b in x.split(8)],
    lambda x: [[b, None] for b in x.split(8)],
    lambda x: [{'input': b} for b in x.split(8)],
    lambda x: (b for b in x.split(8)),
    lambda x: torch.utils.data.DataLoader(x, batch_size=8)], ids=['tensors', 'tuples', 'lists', 'dicts', 'generator',
    'loader'])
@kinds
def test_function(norm, make):
    "Batches of each kind; the number of norms is returned, and the mode of the model does not matter"
    x = data(40, 4, 6, 6)
    net = norm_net(norm).eval()
    assert estimate_batchnorms(net, make(x)) == 2
    assert_estimated(net, [(b,) for b in x.split(8)])
    assert not net.training
    assert estimate_batchnorms(net, make(x), n_batches=2) == 2
    assert_estimated(net, [(b,) for b in x.split(8)[:2]])


def test_learner(new_learner):
    "A learner's own batches, shuffled and transformed; its loader and all random numbers stay"
    learn = new_learner()
    learn.dls = DataLoaders(DataLoader(list(zip(*tiny_data())), bs=8, shuffle=True,
        after_batch=lambda b: (b[0] + 100 + torch.randn(()), b[1])), learn.dls.valid)
    state, rng = get_random_states(), learn.dls.train.rng.getstate()
    assert estimate_batchnorms(learn) == 2
    assert repr(get_random_states()) == repr(state) and learn.dls.train.rng.getstate() == rng
    expected = stats(learn.model)
    close(expected['1'][0], as_used(learn.model, [(100 + torch.randn(48, 4, 6, 6),)])['1'][0], rtol=.1, atol=10.)
    assert expected['1'][0].abs().max() > 10


@pytest.mark.parametrize('within', [False, True], ids=['between trainings', 'in a training'])
def test_learner_in_mixed_precision(new_learner, within):
    "A learner's batches are computed in its own precision, and its training goes on as before"
    learn, dtypes = new_learner(norm_net(nn.BatchNorm2d)), []
    learn.add_cb(BFloat16())
    learn.model[0].register_forward_hook(lambda m, inp, out: dtypes.append((m.training, out.dtype)))
    if within: learn.fit(2, cbs=Callback(before_validate=lambda self: estimate_batchnorms(self.learn)))
    else: estimate_batchnorms(learn)
    assert dtypes and {d for training, d in dtypes} == {torch.bfloat16}
    assert not torch.is_autocast_enabled('cpu') and len({training for training, _ in dtypes}) == 1 + within
    learn.fit(1)


@pytest.mark.parametrize('value', [.333, -3.333, 333.3])
@pytest.mark.parametrize('first', [torch.bfloat16, torch.float32], ids=str)
def test_constant_channel(value, first):
    "A channel that does not vary evaluates to the bias of its norm, as in training, also in another precision"
    net = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    nn.init.zeros_(net[0].weight[:2])
    nn.init.constant_(net[0].bias, value)
    nn.init.zeros_(net[0].bias[1])
    nn.init.uniform_(net[1].bias)
    x = data(16, 4, 6, 6)
    def in_precision(dtype): return torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16)
    with in_precision(first): estimate_batchnorms(net, [x])
    for dtype in (torch.bfloat16, torch.float32):
        with in_precision(dtype), torch.no_grad(): y = net.eval()(x).float()
        for i in (0, 1): close(y[:, i], net[1].bias[i].detach().expand_as(y[:, i]), rtol=0, atol=.01)
        assert .9 < y[:, 2].std() < 1.1  # the other channel varies as it should


def test_no_batches():
    "Without any batch nothing changes, and a model needs batches"
    net = norm_net(nn.BatchNorm2d)
    net(data(8, 4, 6, 6))
    before = bits(net)
    assert estimate_batchnorms(net, []) == 2
    assert_same(bits(net), before)
    with pytest.raises(ValueError, match='needs batches'): estimate_batchnorms(net)
    with pytest.raises(ValueError, match='A model is an nn.Module'): estimate_batchnorms(nn.Linear, [data(8, 4)])


def test_infinite_statistics():
    "Statistics that an overflow has ruined are sound again"
    net = norm_net(nn.BatchNorm2d)
    net[1].running_mean[0], net[1].running_var[1], net[4].running_var.data[2] = torch.nan, torch.inf, torch.nan
    x = data(16, 4, 6, 6)
    estimate_batchnorms(net, [x])
    assert_estimated(net, [(x,)])


@pytest.mark.parametrize('n', [-1, 1.5, '12', None, True])
def test_wrong_number(n):
    "An error when the callback is built names the argument"
    with pytest.raises(ValueError, match='bn_batches is a number of training batches, 0 or more, got'):
        SparsifyCallback(.9, bn_batches=n)
