"A training that starts from an ordinary checkpoint continues bit for bit."
from functools import partial

import pytest
from fastai.basics import Callback
from onecycle_prune.callback import SparsifyCallback
from torch import nn

from helpers import assert_resumes, assert_same
from networks import adam, momentum_sgd

ways_to_prune = [
    {}, dict(context='global'), dict(granularity='filter'), dict(granularity='2:4', sparsity=.5),
    dict(granularity='kernel', layers=nn.Conv2d), dict(schedule='iterative'), dict(schedule='dsd'),
    dict(sparsity={nn.Conv2d: .9, '8': .5})]


@pytest.mark.parametrize('kwargs', ways_to_prune, ids=str)
@pytest.mark.parametrize('opt_func', [momentum_sgd, adam], ids=['sgd', 'adam'])
def test_resume(new_learner, kwargs, opt_func):
    "Weights, batch norms and sparsities are those of the training without an interruption"
    assert_resumes(partial(new_learner, opt_func=opt_func), **dict(sparsity=.9) | kwargs)


def test_resume_masks(new_learner):
    "The masks, on which later batches depend, are the same too"
    first, second = SparsifyCallback(.9), SparsifyCallback(.9)
    learn = new_learner()
    save_half = Callback(after_epoch=lambda self: self.save('half') if self.epoch == 1 else None)
    learn.fit(4, 1e-2, cbs=[first, save_half])
    other = new_learner().load('half', weights_only=False)
    other.fit(4, 1e-2, start_epoch=2, cbs=second)
    assert_same(first.sparsifier.masks, second.sparsifier.masks)
