"Looking at a training and at a model, comparing them, and the callback of fasterai."
import subprocess, sys, textwrap
from functools import partial
from pathlib import Path

import torch
from fastai.basics import Callback
from fastai.callback.all import SaveModelCallback
from onecycle_prune.callback import SparsifyCallback
from torch import nn

from networks import n_batches

# For tensors or dicts of them, bit for bit.
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


def bits(model):
    "A copy of everything in the `state_dict`"
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_resumes(make, starts=(1, 3), **kwargs):
    "A training of four epochs with `SparsifyCallback(**kwargs)` continues from a checkpoint as without an interruption"
    whole, save = make(), SaveModelCallback(every_epoch=True, with_opt=True)
    whole.fit_one_cycle(4, 1e-2, cbs=[SparsifyCallback(**kwargs), save])
    for start in starts:
        resumed = make().load(f'model_{start-1}', with_opt=True, weights_only=False)
        resumed.fit_one_cycle(4, 1e-2, start_epoch=start, cbs=SparsifyCallback(**kwargs))
        assert_same(bits(resumed.model), bits(whole.model))
        assert resumed.recorder.sparsities == whole.recorder.sparsities[start*n_batches:]
    return whole


def zeros(m):
    "Which weights of the layer `m` are zero, as a flat list"
    return (m.weight == 0).flatten().tolist()


def all_plans(module):
    "The plans that the regions of `module` have made; None stands for a shape that was left to PyTorch"
    from onecycle_prune.deploy.regions import all_regions # It needs numba, as few tests do.
    return [plan for r in all_regions(module) for plan in r._plans.values()]


def assert_planned(module):
    "Plans, and not PyTorch, have computed the regions of `module` for each shape so far"
    plans = all_plans(module)
    assert plans and all(plans)


def channel(m, c):
    "The view of `m.weight` that makes output channel `c`, in a transposed convolution too"
    if not getattr(m, 'transposed', False): return m.weight[c]
    n_in, n_out = m.in_channels//m.groups, m.out_channels//m.groups
    g = c//n_out
    return m.weight[g*n_in:(g+1)*n_in, c%n_out]


class Probe(Callback):
    "Keep the values of `f(model)` after each batch of training, or of validation, in `seen`"
    order = SparsifyCallback.order + 1
    def __init__(self, f, when='train'): self.f, self.seen, self.when = f, [], when
    def after_batch(self):
        if (self.when == 'train') == self.training: self.seen.append(self.f(self.model))


def before_training_batches(f):
    "A callback that calls `f(learner)` before each training batch"
    return Callback(before_batch=lambda self: f(self.learn) if self.training else None)


def run_python(code, **kwargs):
    "Run `code` in a new Python process that can import the tests' modules; keywords go to `subprocess.run`"
    start = f'import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n'
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', start + textwrap.dedent(code)], timeout=120, **kwargs)


def fasterai_callback(sparsity, context='local', layers=(nn.Conv2d, nn.Linear), **kwargs):
    "fasterai's callback with the same schedule and criterion"
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import one_cycle
    from fasterai.sparse.sparsify_callback import SparsifyCallback
    return SparsifyCallback(sparsity, 'weight', context, large_final, one_cycle, layer_type=layers, **kwargs)


def our_callback(sparsity, context='local', **kwargs):
    "Ours, with the context that is fasterai's default"
    return SparsifyCallback(sparsity, context=context, **kwargs)
