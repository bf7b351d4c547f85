"Wrong input raises an error that says what was given and what is allowed, before anything changes."
import math
from functools import partial

import pytest, torch
from fastai.basics import Adam, Callback, accuracy
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import SchedCos, sched_cos
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits
from networks import tiny_net

foreign = nn.Sequential(nn.Linear(4, 4))  # a module of another model

# The callback raises these when it is built.
at_build = [
    (dict(sparsity=-.1), r'fraction in \[0, 1\], got -0\.1'),
    (dict(sparsity=1.5), r'fraction in \[0, 1\], got 1\.5'),
    (dict(sparsity=90), r'fraction in \[0, 1\], got 90\. Did you mean 0\.9\?'),
    (dict(sparsity=101), r'fraction in \[0, 1\], got 101\.$'),
    (dict(sparsity='high'), r"fraction in \[0, 1\].*got 'high'"),
    (dict(sparsity=None), r'fraction in \[0, 1\].*got None'),
    (dict(), r'fraction in \[0, 1\].*got None'),
    (dict(sparsity=math.nan), r'fraction in \[0, 1\], got nan'),
    (dict(sparsity=math.inf), r'fraction in \[0, 1\], got inf'),
    (dict(sparsity=True), r'fraction in \[0, 1\].*got True'),
    (dict(sparsity=[.9]), r'fraction in \[0, 1\].*got \[0\.9\]'),
    (dict(sparsity={}), r'dict of layers to fractions, got \{\}'),
    (dict(sparsity={'0': .5, '3': 50}), r'fraction in \[0, 1\], got 50\. Did you mean 0\.5\?'),
    (dict(sparsity={'0': None}), r'got None'),
    (dict(granularity='filters'), r"granularity: 'filters'. Did you mean 'filter'\? Allowed: weight, .*kernel.*'2:4'"),
    (dict(granularity='Weight'), r"Did you mean 'weight'\?"),
    (dict(granularity=None), r'granularity: None.*Allowed: weight'),
    (dict(granularity=['weight']), r"granularity: \['weight'\].*Allowed: weight"),
    (dict(context='globl'), r"context: 'globl'. Did you mean 'global'\? Allowed: local, global"),
    (dict(context=3), r'context: 3.*Allowed: local, global'),
    (dict(criteria='large-final'),
        r"criterion: 'large-final'. Did you mean 'large_final'\? Allowed: large_final, .*function of a module"),
    (dict(criteria=3), r'criterion: 3.*Allowed: large_final'),
    (dict(schedule='one_cylce'),
        r"schedule: 'one_cylce'. Did you mean 'one_cycle'\? Allowed: one_cycle, .*function of a position"),
    (dict(schedule=.5), r'schedule: 0\.5.*Allowed: one_cycle'),
    (dict(schedule=lambda pos: 2*pos), r'progress in \[0, 1\].*at 0\.5'),
    (dict(schedule=lambda pos: -pos), r'progress in \[0, 1\].*at 0\.0'),
    (dict(schedule=lambda pos: math.nan), r'progress in \[0, 1\].*nan'),
    (dict(schedule=lambda pos: .5 if pos < 1 else 1.1), r'progress in \[0, 1\].*1\.1 at 1\.0'),
    (dict(schedule=sched_cos), r'schedule'),  # without its start and end
    (dict(layers=[]), r'Nothing to prune: layers=\[\] is empty'),
    (dict(schedule=SchedCos), r'schedule'),
    (dict(schedule=lambda pos: None), r'progress in \[0, 1\]'),
    (dict(granularity='4:2', sparsity=None), r"0 < n < m, got '4:2'"),
    (dict(granularity='0:4', sparsity=None), r"0 < n < m, got '0:4'"),
    (dict(granularity='2:4'), r'implies a sparsity of 0\.5, got 0\.9'),
    (dict(granularity='2:4', sparsity={'0': .9}), r'implies a sparsity of 0\.5, got 0\.9'),
    (dict(granularity='2:4', sparsity=50), r'fraction in \[0, 1\], got 50'),
    (dict(granularity='layer', context='local'), r"'layer' prunes whole layers.*context='global'"),
]

# The callback raises these when the training begins, since they depend on the model.
at_fit = [
    (dict(sparsity={'head': .9}), r"layer: 'head'.*Allowed: 0, 3, 8"),
    (dict(sparsity={'0': .9, '03': .5}), r"layer: '03'.*Allowed: 0, 3, 8"),
    (dict(sparsity={nn.Conv1d: .9}), r"entry 'Conv1d'.*matches no layer.*Layers: 0, 3, 8"),
    (dict(sparsity={nn.BatchNorm2d: .9}), r'BatchNorm2d.*Allowed: Conv1d, Conv2d'),
    (dict(sparsity={nn.Conv2d: .9, '0': .5, '3': .5}), r"entry 'Conv2d'.*other entries have 0, 3"),
    (dict(sparsity={5: .5}), r'Unknown layers?: 5'),
    (dict(sparsity={foreign: .5}), r'Sequential.*Allowed: 0, 3, 8.*of this model'),
    (dict(sparsity={'8': .5}, layers=nn.Conv2d), r"layer: '8'.*Allowed: 0, 3\b"),
    (dict(layers='head'), r"layer: 'head'.*Allowed: 0, 3, 8"),
    (dict(layers=['0', '33']), r"layer: '33'. Did you mean '3'\? Allowed: 0, 3, 8"),
    (dict(layers=lambda m: False), r'Nothing to prune.* of 0, 3, 8'),
    (dict(layers=foreign), r'Sequential.*Allowed: 0, 3, 8'),
    (dict(layers='8', granularity='kernel'),
        r"Layer '8' \(Linear\).*does not support granularity 'kernel', only 'weight'"),
    (dict(layers=nn.Linear, granularity='filter'), r"Nothing to prune.*'filter'"),
    (dict(granularity='3:6', sparsity=None),
        r"Layer '0' \(Conv2d\).*4 input channels do not divide by 6, as '3:6' needs.*No other layer was chosen"),
    (dict(granularity='3:8', sparsity=None, layers='0'), r"Layer '0'.*4 input channels do not divide by 8"),
]


def with_default(kwargs):
    "With a valid sparsity where something else is wrong"
    return kwargs if not kwargs else dict(sparsity=.9) | kwargs


def case(o):
    "A name for a test that is the same in every run"
    if not isinstance(o, dict): return ''
    def name(v): return getattr(v, '__name__', type(v).__name__ if isinstance(v, nn.Module) else v)
    return ', '.join(f'{k}={name(v)}' for k, v in o.items()) or 'nothing'


@pytest.mark.parametrize('kwargs,message', at_build, ids=case)
def test_error_when_built(kwargs, message):
    with pytest.raises(ValueError, match=message): SparsifyCallback(**with_default(kwargs))


def as_lists(o):
    "An optimizer's state with its tensors as lists, which can be compared"
    if isinstance(o, torch.Tensor): return o.tolist()
    if isinstance(o, dict): return {k: as_lists(v) for k, v in o.items()}
    return [*map(as_lists, o)] if isinstance(o, (list, tuple)) else o


@pytest.fixture
def trained(new_learner):
    "A function that makes equal learners, trained for an epoch, so that the optimizer has a state"
    def _make(model=None):
        learn = new_learner(model, opt_func=partial(Adam, wd=.01), metrics=accuracy)
        learn.fit(1, 1e-3)
        return learn
    return _make


@pytest.mark.parametrize('kwargs,message', at_fit, ids=case)
def test_error_before_first_step(trained, kwargs, message):
    "The learner trains on after the error as if nothing had happened"
    learn, untouched = trained(), trained()
    cb = SparsifyCallback(**with_default(kwargs))
    def parts(): return as_lists(learn.opt.state_dict()['state']), [*learn.cbs], [*learn.metrics]
    weights_before, parts_before, logger = bits(learn.model), parts(), learn.logger
    with pytest.raises(ValueError, match=message): learn.fit(1, 1e-3, cbs=cb)
    assert_same(weights_before, bits(learn.model))
    assert parts() == parts_before and learn.logger is logger
    for o in learn, untouched: o.fit(1, 1e-3)
    assert_same(bits(learn.model), bits(untouched.model))
    assert learn.recorder.metric_names == untouched.recorder.metric_names


def test_error_leaves_progress_bar(new_learner):
    "After an error the table of a training is still drawn, and not drawn under `no_bar`"
    learn, rows = new_learner().add_cb(ProgressCallback()), []
    learn.logger = rows.append
    with pytest.raises(ValueError): learn.fit(1, cbs=SparsifyCallback(.9, layers='head'))
    with learn.no_bar(): learn.fit(1)
    assert [len(row) for row in rows] == [4]


class Doubled(nn.Module):
    def forward(self, w): return 2*w


def parametrized():
    net = tiny_net()
    nn.utils.parametrize.register_parametrization(net[3], 'weight', Doubled())
    return net


def with_weight(value):
    net = tiny_net()
    net[3].weight.data[1, 2, 0, 0] = value
    return net


@pytest.mark.parametrize('make,message', [
    (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144)),
        r'Nothing to prune: Sequential has no convolution and no linear layer'),
    (parametrized, r"Layer '3'.*computes its weight from other tensors.*Remove its parametrization"),
    (lambda: with_weight(math.nan), r"Layer '3' \(Conv2d\) has NaN or infinite weights"),
    (lambda: with_weight(math.inf), r"Layer '3' \(Conv2d\) has NaN or infinite weights"),
], ids=['no layers', 'parametrized', 'nan', 'inf'])
def test_error_about_model(new_learner, make, message):
    learn = new_learner(make())
    before = bits(learn.model)
    with pytest.raises(ValueError, match=message): learn.fit(1, 1e-3, cbs=SparsifyCallback(.5))
    assert_same(before, bits(learn.model))
    assert not any(isinstance(cb, SparsifyCallback) for cb in learn.cbs)


@pytest.mark.parametrize('criterion,message', [
    (lambda m: m.weight.mean(), r"score for each weight.*layer '0'.*8, 4, 3, 3"),
    (lambda m: None, r"score for each weight.*layer '0'.*8, 4, 3, 3"),
    (lambda m: m.weight.log(), r"layer '0' are NaN or infinite"),
], ids=['shape', 'none', 'nan'])
def test_error_about_scores(criterion, message):
    "Wrong scores raise an error before any weight is pruned"
    net = tiny_net()
    before, sp = bits(net), Sparsifier(net, criteria=criterion)
    with pytest.raises(ValueError, match=message): sp.prune(.5)
    assert_same(before, bits(net))


def test_error_when_diverging(new_learner):
    "A training that diverges stops with an error that names the layer"
    def diverge(self):
        if self.iter == 2: self.model[3].weight.grad[0] = math.nan
    with pytest.raises(ValueError, match=r"Scores of layer '3' are NaN or infinite.*diverged"):
        new_learner().fit(1, 1e-3, cbs=[SparsifyCallback(.9, schedule='lin'), Callback(before_step=diverge)])


@pytest.mark.parametrize('kwargs,message', [
    (dict(granularity='filters'), r"Did you mean 'filter'"), (dict(context='globl'), r"Did you mean 'global'"),
    (dict(criteria='tailor'), r"Did you mean 'taylor'"), (dict(layers='head'), r'Allowed: 0, 3, 8'),
    (dict(granularity='3:6'), r"Layer '0'"),
    (dict(granularity='layer', context='local'), r"context='global'")], ids=case)
def test_error_of_sparsifier(kwargs, message):
    "`Sparsifier` raises the same errors when it is built"
    net = tiny_net()
    before = bits(net)
    with pytest.raises(ValueError, match=message): Sparsifier(net, **kwargs)
    assert_same(before, bits(net))


@pytest.mark.parametrize('sparsity,message', [
    (1.5, 'fraction'), (-.1, 'fraction'), (90, r'0\.9'), ('high', 'fraction'), (math.nan, 'fraction'),
    (None, 'fraction'), ({}, 'fraction'), ({'0': 2}, 'fraction'), ({'head': .5}, 'Allowed: 0, 3, 8')], ids=str)
def test_error_of_prune(sparsity, message):
    "`Sparsifier.prune` raises the same errors for a sparsity"
    net = tiny_net()
    before, sp = bits(net), Sparsifier(net)
    with pytest.raises(ValueError, match=message): sp.prune(sparsity)
    assert_same(before, bits(net))
