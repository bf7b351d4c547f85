"A tiny learner that is the same each time it is made, what several test files read off its model, and pools of weights with what goes of them."
import os
from functools import partial

import matplotlib, pytest, torch
matplotlib.use('Agg')
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'  # a GPU's kernels are run by Triton's interpreter, if it is told before it is imported

from fastai.basics import Categorize, DataLoader, DataLoaders, Datasets, Learner, SGD, noop
from fastai.callback.progress import ProgressCallback
from hypothesis import strategies as st
from onecycle_prune.callback import SparsifyCallback
from torch import nn

quick_sgd = partial(SGD, mom=.9)


def tiny_net():
    "Two convolutions with batch norms and a linear layer, the same weights each time; its layers are named 0, 3 and 8"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def tiny_data(n=48):
    "Images of noise, with classes that can be learned from their channels"
    x = torch.randn(n, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    return x, x.mean((2, 3)).argmax(1)


def tiny_dls(bs=8):
    "Five batches to train on, the last one smaller, and a validation set, always in the same order"
    items = list(zip(*tiny_data()))
    return DataLoaders(DataLoader(items[:36], bs=bs), DataLoader(items[36:], bs=bs))


def hush(learn):
    "Without a progress bar or a table"
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn


@pytest.fixture
def new_learner(tmp_path):
    "A function that makes a learner, silent and with its files in a temporary folder; keywords go to `Learner`"
    def _make(model=None, opt_func=quick_sgd, path=tmp_path, **kwargs):
        return hush(Learner(tiny_dls(), model or tiny_net(), nn.CrossEntropyLoss(), opt_func=opt_func, path=path, **kwargs))
    return _make


@pytest.fixture
def item_learner(tmp_path):
    "A function that makes a learner whose data are items and transforms, so that it can predict one and be exported"
    def _make(**kwargs):
        x, y = tiny_data()
        ds = Datasets(range(48), [[lambda i: x[i]], [lambda i: int(y[i]), Categorize()]], splits=[range(36), range(36, 48)])
        dls = ds.dataloaders(bs=8, num_workers=0, device='cpu')
        return hush(Learner(dls, tiny_net(), nn.CrossEntropyLoss(), path=tmp_path, **kwargs))
    return _make


def bits(model):
    "A copy of everything in the `state_dict`"
    return {k: v.clone() for k, v in model.state_dict().items()}


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # of tensors or dicts of them, bit for bit


def n_zeros(model):
    "The number of zero weights of each convolution and linear layer, by name"
    return {n: int((m.weight == 0).sum()) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@st.composite
def drawn_pool(draw, dtype=st.sampled_from(dtypes)):
    "The weights of a pool of flat layers, among them equals, zeros and subnormals, and what is pruned of each"
    dtype, values = draw(dtype), draw(st.sampled_from([
        st.floats(-1e4, 1e4, width=16), st.sampled_from([-1., -0., 0., .5, 2.]), st.just(-.25), st.sampled_from([i*2.**-24 for i in range(-4, 5)])]))
    def layer(n): return torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=dtype), torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return list(map(list, zip(*[layer(draw(st.integers(1, 20))) for _ in range(draw(st.integers(1, 4)))])))


def by_sort(weights, pruned, k, keep=False):
    "Masks of a pool by a stable sort: what is pruned first, then the lowest magnitudes, but with `keep` the best of each layer never"
    keys = [w.abs().double().masked_fill(g, -1).flatten() for w, g in zip(weights, pruned)]
    for x in keys if keep else []: x[len(x)-1 - x.flip(0).argmax()] = torch.inf
    keys = torch.cat(keys)
    res = torch.zeros_like(keys, dtype=torch.bool)
    res[keys.argsort(stable=True)[:k]] = True
    return [r.view(g.shape) for r, g in zip(res.split([g.numel() for g in pruned]), pruned)]


def pytest_addoption(parser): parser.addoption('--peer', action='store_true', help="hold the situations of test_reliability.py against fasterai's callback")


def fasterai_callback(sparsity, context='local', layers=(nn.Conv2d, nn.Linear), **kwargs):
    "The peer's callback with the same schedule, or its own names for what is asked"
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import one_cycle
    from fasterai.sparse.sparsify_callback import SparsifyCallback
    return SparsifyCallback(sparsity, 'weight', context, large_final, one_cycle, layer_type=layers, **kwargs)


@pytest.fixture
def prune(request):
    "A function of sparsity, context and others to a callback that prunes single weights"
    return fasterai_callback if request.config.getoption('peer') else lambda sparsity, context='local', **kw: SparsifyCallback(sparsity, context=context, **kw)


@pytest.fixture
def tolerance(request):
    "How far from the target a layer may end: not at all, but for the peer, whose exactness is a situation of its own"
    return .05 if request.config.getoption('peer') else 0


@pytest.fixture(autouse=True)
def told(request, record_property):
    "The report of a test names its situation, by its docstring, and the area, by that of its class or file"
    where = request.cls or request.module
    record_property('area', getattr(where, 'area', None) or (where.__doc__ or '').partition('\n')[0])
    record_property('situation', request.function.__doc__ or request.function.__name__)
