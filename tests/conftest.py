"Fixtures and options of all tests; networks are in networks.py, references in reference.py."
import os

import matplotlib, pytest, torch
matplotlib.use('Agg')
# Without a GPU, Triton's interpreter runs the kernels. It has to know before it is imported.
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'

from fastai.basics import Categorize, Datasets, Learner
from torch import nn

from helpers import fasterai_callback, our_callback
from networks import silence, tiny_data, tiny_learner, tiny_net


def pytest_addoption(parser):
    parser.addoption('--fasterai', action='store_true',
        help="test fasterai's callback in the situations of test_reliability.py")


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes more than about five seconds')
    config.addinivalue_line('markers', 'gpu: needs CUDA, and is skipped without it')


def pytest_runtest_setup(item):
    if item.get_closest_marker('gpu') and not torch.cuda.is_available(): pytest.skip('needs a GPU')


@pytest.fixture(autouse=True)
def name_situation(request, record_property):
    "A test's report names its situation, from its docstring, and the area, from the docstring of its class or file"
    where = request.cls or request.module
    record_property('area', getattr(where, 'area', None) or (where.__doc__ or '').partition('\n')[0])
    record_property('situation', request.function.__doc__ or request.function.__name__)


@pytest.fixture
def new_learner(tmp_path):
    "A function that makes a `tiny_learner` with its files in a temporary folder"
    def _make(model=None, path=tmp_path, **kwargs): return tiny_learner(path, model, **kwargs)
    return _make


@pytest.fixture
def item_learner(tmp_path):
    "A function that makes a learner of items and transforms, which can predict one item and be exported"
    def _make(**kwargs):
        x, y = tiny_data()
        tfms = [[lambda i: x[i]], [lambda i: int(y[i]), Categorize()]]
        datasets = Datasets(range(48), tfms, splits=[range(36), range(36, 48)])
        dls = datasets.dataloaders(bs=8, num_workers=0, device='cpu')
        return silence(Learner(dls, tiny_net(), nn.CrossEntropyLoss(), path=tmp_path, **kwargs))
    return _make


@pytest.fixture
def with_fasterai(request):
    "Whether fasterai's callback is tested in place of ours"
    return request.config.getoption('--fasterai')


@pytest.fixture
def prune(with_fasterai):
    "A function of sparsity, context and others that makes a callback which prunes single weights"
    return fasterai_callback if with_fasterai else our_callback


@pytest.fixture
def tolerance(with_fasterai):
    "How far from its target the sparsity of a layer may end: 0, or .05 for fasterai, which is not exact"
    return .05 if with_fasterai else 0

