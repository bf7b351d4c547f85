"Small networks, data and learners that are the same each time they are made, and random pools of weights."
from functools import partial

import torch
from fastai.basics import DataLoader, DataLoaders, Learner, SGD, noop
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import Adam
from hypothesis import strategies as st
from torch import nn

momentum_sgd = partial(SGD, mom=.9)
adam = partial(Adam, wd=.05)

n_weights = {'0': 288, '3': 1152, '8': 64}  # of the layers of `tiny_net`
total_weights = sum(n_weights.values())
n_batches = 5  # an epoch of `tiny_dls`


def tiny_net():
    "Two convolutions with batch norms and a linear layer, named 0, 3 and 8, with the same weights each time"
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Tanh(),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def tiny_data(n=48):
    "`n` images of noise, shape (n, 4, 6, 6), and their classes, which can be learned from the means of the channels"
    x = torch.randn(n, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    return x, x.mean((2, 3)).argmax(1)


def tiny_images(n=4): return torch.randn(n, 4, 6, 6)


def tiny_dls(bs=8):
    "Five training batches, the last one smaller, and a validation set, always in the same order"
    items = list(zip(*tiny_data()))
    return DataLoaders(DataLoader(items[:36], bs=bs), DataLoader(items[36:], bs=bs))


def silence(learn):
    "Remove the progress bar and the table of `learn`, and return it"
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn


def tiny_learner(path, model=None, opt_func=momentum_sgd, **kwargs):
    "A silent learner with its files in `path`; other keywords go to `Learner`"
    model = model or tiny_net()
    return silence(Learner(tiny_dls(), model, nn.CrossEntropyLoss(), opt_func=opt_func, path=path, **kwargs))


def fill(m, values):
    "Give the layer `m` the weights `values`, in any shape with as many numbers, and return it"
    with torch.no_grad(): m.weight.copy_(torch.as_tensor(values, dtype=m.weight.dtype).view_as(m.weight))
    return m


def line(*values):
    "A linear layer with one output and the weights `values`"
    return fill(nn.Linear(len(values), 1, bias=False), values)


dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
some_weights = st.sampled_from([
    st.floats(-1e4, 1e4, width=16),
    st.sampled_from([-1., -0., 0., .5, 2.]),  # ties, with both zeros
    st.just(-.25),
    st.sampled_from([i*2.**-24 for i in range(-4, 5)])])  # float16's subnormal numbers


@st.composite
def drawn_pool(draw, dtype=st.sampled_from(dtypes)):
    "The weights of a pool of flat layers, with ties, zeros and subnormal numbers, and their pruned masks: two lists"
    dtype, values = draw(dtype), draw(some_weights)
    weights, pruned = [], []
    for n in draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)):
        weights.append(torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=dtype))
        pruned.append(torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))))
    return [weights, pruned]
