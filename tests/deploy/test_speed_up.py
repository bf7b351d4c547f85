"A network of speed_up computes the same, wherever it is used"
import copy, multiprocessing, os, pickle, threading, warnings

import pandas as pd, pytest, torch, torchvision
from fastai.learner import load_learner
from fastai.tabular.model import TabularModel
from fastai.vision.all import TensorImage, xresnet18
from onecycle_prune.all import Sparsifier, costs, plot_costs, speed_up
from onecycle_prune.deploy import speed_up as module
from onecycle_prune.deploy.regions import all_regions
from torch import nn
from torch.nn.utils import parametrize, prune as torch_prune

from helpers import all_plans, assert_planned, assert_same, bits, run_python


def random_norms(net):
    "Statistics as after a training; the scores of a network that is not trained can all be zero"
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d) and m.track_running_stats:
            nn.init.uniform_(m.running_var, .5, 2)
            nn.init.normal_(m.running_mean, 0, .1)
        if isinstance(m, nn.Linear) and not m.weight.any(): nn.init.normal_(m.weight)
    return net


def pruned(net, sparsity=.9):
    Sparsifier(random_norms(net), context='local').prune(sparsity)
    return net.eval().requires_grad_(False)


def small_net():
    torch.manual_seed(0)
    def block(n, m): return nn.Sequential(nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(True))
    blocks = block(3, 16), nn.MaxPool2d(2), block(16, 32), block(32, 32)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(32, 5))


def assert_near(y, expected):
    assert y.shape == expected.shape
    if y.numel(): assert (y - expected).abs().max() <= 1e-4*float(expected.abs().max())


def plans(net, *xs):
    "The network in plans, whatever is faster"
    layers = module._layers(net)
    cases = module._check_cases(net, xs)
    fast = module.FastNetwork(net, xs, 'plans', set(layers), None)
    assert module._is_right(fast, cases)
    # A layer that no plan computes would be right too.
    assert_planned(fast.built)
    return fast


names = ['resnet18', 'mobilenet_v2', 'mobilenet_v3_small', 'efficientnet_b0', 'densenet121', 'squeezenet1_1',
    'shufflenet_v2_x0_5', 'regnet_x_400mf', 'mnasnet0_5', 'convnext_tiny']


class TestNetworks:
    "Whole networks in plans, one region or a few"
    @pytest.mark.parametrize('name', names)
    def test_torchvision(self, name):
        net = pruned(getattr(torchvision.models, name)(num_classes=10))
        x = torch.randn(2, 3, 64, 64)
        fast = plans(net, x)
        assert_near(fast(x), net(x))
        assert torch.equal(fast(x).argmax(1), net(x).argmax(1))
        x = torch.randn(1, 3, 96, 64)
        assert_near(fast(x), net(x))

    def test_googlenet(self):
        net = pruned(torchvision.models.googlenet(num_classes=10, init_weights=False, aux_logits=False))
        x = torch.randn(2, 3, 64, 64)
        assert_near(plans(net, x)(x), net(x))

    def test_vision_transformer(self):
        "Attention: its projections are sparse too"
        net = pruned(torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=5))
        x = torch.randn(3, 3, 32, 32)
        fast = plans(net, x)
        assert_near(fast(x), net(x))
        names = {n.name for plan in all_plans(fast.built) for n in plan.shapes}
        assert sum(n.endswith('in_proj') for n in names) == 2
        # After the convolution of the image, the layers between attention and attention are one region.
        of_regions = [[type(n).__name__ for n in r.nodes] for r in all_regions(fast.built)]
        assert sum(o.count('Conv') == 2 and 'Activate' in o and 'Normalize' in o for o in of_regions) == 2

    def test_index_of_a_region(self):
        "What takes a part of an output stays in PyTorch"
        class Net(nn.Sequential):
            def forward(self, x): return super().forward(x)[:, 0]
        net = pruned(Net(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 20)))
        x = torch.randn(3, 5, 20)
        assert_near(plans(net, x)(x), net(x))

    def test_swin(self):
        net = pruned(torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5))
        x = torch.randn(2, 3, 32, 32)
        assert_near(plans(net, x)(x), net(x))

    def test_fastai(self):
        net = pruned(xresnet18(n_out=5))
        x = torch.randn(2, 3, 64, 64)
        assert_near(plans(net, x)(x), net(x))

    def test_tabular(self):
        net = pruned(TabularModel([(10, 3), (5, 2)], 3, 2, layers=[50, 20]))
        xs = torch.randint(0, 5, (7, 2)), torch.randn(7, 3)
        fast = plans(net, *xs)
        assert_near(fast(*xs), net(*xs))
        # fastai's embedding is a subclass, and still one call.
        assert not [o for o in fast.built.graph.nodes if o.op == 'get_attr']

    @pytest.mark.parametrize('batch_first', [True, False])
    def test_transformer_encoder(self, batch_first):
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
        net = pruned(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        x = torch.randn(3, 7, 32)
        assert_near(speed_up(net, x)(x), net(x))


class Skips(nn.Module):
    "Depends on values and on shapes"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    def forward(self, x):
        x = self.a(x)
        if x.mean() > 100: x = -x
        return self.b(x) if x.shape[-1] > 4 else x


class Remembers(nn.Module):
    "A hook stores what forward reads, as in fastai's U-Net"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.a.register_forward_hook(self.store)
    def store(self, m, args, out): self.stored = out.detach()
    def forward(self, x): return self.b(self.a(x)) + self.stored


class Twice(nn.Module):
    "One layer in two places"
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    def forward(self, x): return self.a(self.norm(self.a(x)))


class Other(nn.Conv2d):
    def forward(self, x): return super().forward(2*x)


def normed():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return net.eval()


def masked():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    torch_prune.l1_unstructured(net[0], 'weight', .9)
    return net.eval()


hard = {'depends on values': (Skips, 3), 'hook': (Remembers, 3), 'layer in two places': (Twice, 8),
    'parametrized': (normed, 3),
    "PyTorch's masks": (masked, 3), 'subclass': (lambda: nn.Sequential(Other(3, 4, 3), nn.Conv2d(4, 4, 1)), 3),
    'transposed': (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 4, 3)), 3),
    '3d': (lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3, padding=1)), 3),
    'norm without statistics': (lambda: nn.Sequential(nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False)), 3),
    'norm before': (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3)), 3),
    'group norm': (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 1)), 3)}


class TestForwards:
    "Networks that cannot be followed as a whole, and those that surprise"
    @pytest.mark.parametrize('make,channels', hard.values(), ids=hard)
    def test_hard(self, make, channels):
        torch.manual_seed(0)
        net = make().eval()
        computed = any(hasattr(m, 'weight_orig') or parametrize.is_parametrized(m) for m in net.modules())
        if not computed: net = pruned(net)
        x = torch.randn(2, channels, 12, 12)
        fast = speed_up(net, x)
        for shape in ((2, channels, 12, 12), (3, channels, 9, 14)):
            x = torch.randn(shape)
            with torch.no_grad(): assert_near(fast(x), net(x))

    def test_two_inputs_and_outputs(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.emb, self.lin, self.out = nn.Embedding(5, 8), nn.Linear(4, 8), nn.Linear(16, 3)
            def forward(self, cats, conts):
                x = torch.cat([self.emb(cats), self.lin(conts)], 1)
                return self.out(x), dict(x=x)
        net = pruned(Net(), .5)
        xs = torch.randint(0, 5, (6,)), torch.randn(6, 4)
        y, more = speed_up(net, xs)(*xs)
        assert_near(y, net(*xs)[0])
        assert_near(more['x'], net(*xs)[1]['x'])


@pytest.fixture(scope='module')
def fast_and_net():
    net = pruned(small_net())
    return plans(net, torch.randn(4, 3, 32, 32)), net


class TestUse:
    "Where a fast network is used"
    @pytest.mark.parametrize('shape', [(1, 3, 32, 32), (7, 3, 32, 32), (0, 3, 32, 32), (2, 3, 17, 50), (1, 3, 4, 4)])
    def test_shapes(self, fast_and_net, shape):
        fast, net = fast_and_net
        x = torch.randn(shape)
        assert_near(fast(x), net(x))

    def test_many_shapes(self, fast_and_net):
        "More image sizes than plans are kept"
        fast, net = fast_and_net
        for size in [*range(8, 30), 8, 9]:
            x = torch.randn(1, 3, size, size)
            assert_near(fast(x), net(x))

    @pytest.mark.parametrize('n_threads', [1, 2, 3])
    def test_threads(self, fast_and_net, n_threads):
        "As many threads as torch uses, with fewer or more images"
        fast, net = fast_and_net
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(n_threads)
            for n in (1, 2, 5):
                x = torch.randn(n, 3, 32, 32)
                for _ in range(20): assert_near(fast(x), net(x))
        finally: torch.set_num_threads(before)

    def test_python_threads(self, fast_and_net):
        "Several Python threads at once"
        fast, net = fast_and_net
        xs = [torch.randn(1 + i % 3, 3, 32, 32) for i in range(8)]
        expected, found = [net(x) for x in xs], [None]*8
        def _work(i):
            for _ in range(20): found[i] = fast(xs[i])
        threads = [threading.Thread(target=_work, args=(i,)) for i in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        for y, e in zip(found, expected): assert_near(y, e)

    @pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
    def test_fork(self, fast_and_net):
        "A process that is forked after a call"
        fast, net = fast_and_net
        before = torch.get_num_threads()
        x = torch.randn(2, 3, 32, 32)
        expected = net(x)
        torch.set_num_threads(2)
        try:
            fast(x)
            context = multiprocessing.get_context('fork')
            queue = context.Queue()
            process = context.Process(target=lambda: queue.put(fast(x).numpy()))
            process.start()
            assert_near(torch.from_numpy(queue.get(timeout=60)), expected)
            process.join(60)
        finally: torch.set_num_threads(before)

    def test_pickle(self, fast_and_net, tmp_path):
        "In another process"
        fast, net = fast_and_net
        x = torch.randn(2, 3, 32, 32)
        torch.save([fast, x, net(x)], tmp_path/'a.pt')
        run_python(f'''
            import torch
            fast, x, y = torch.load({str(tmp_path/'a.pt')!r}, weights_only=False)
            assert (fast(x) - y).abs().max() <= 1e-4*y.abs().max()''', check=True)

    def test_copy(self, fast_and_net):
        fast, net = fast_and_net
        x = torch.randn(2, 3, 32, 32)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert_near(other(x), net(x))
            assert '_built' not in pickle.loads(pickle.dumps(other)).__dict__

    def test_learner(self, item_learner, prune, tmp_path):
        "`learn.model`: predictions, validation, export"
        learn = item_learner(metrics=lambda p, t: (p.argmax(1) == t).float().mean())
        learn.fit(1, 1e-2, cbs=prune(.9))
        preds, metrics, one = learn.get_preds()[0], learn.validate(), learn.predict(3)
        before = bits(learn.model)
        fast = speed_up(learn, learn.dls.one_batch()[0])
        assert_same(bits(learn.model), before)
        learn.model = fast
        assert_near(learn.get_preds()[0], preds)
        assert list(learn.validate()) == pytest.approx(list(metrics), rel=1e-4)
        assert_near(learn.predict(3)[2], one[2])
        learn.export(tmp_path/'fast.pkl')
        loaded = load_learner(tmp_path/'fast.pkl')
        assert_near(loaded.predict(3)[2], one[2])
        assert_near(loaded.get_preds(dl=learn.dls.valid)[0], preds)

    def test_tensor_subclass(self, fast_and_net):
        fast, net = fast_and_net
        x = torch.randn(2, 3, 32, 32)
        assert_near(torch.Tensor(fast(TensorImage(x))), net(x))

    def test_data_parallel_and_grad(self):
        "Wrapped models, a model in training mode, and inputs that need gradients"
        net = pruned(small_net())
        x = torch.randn(2, 3, 32, 32, requires_grad=True)
        expected = net(x).detach()
        net.train()
        fast = speed_up(nn.DataParallel(net), x)
        assert net.training and not fast.training
        assert_near(fast(x), expected)
        assert not fast(x).requires_grad

    def test_nothing_changes(self):
        "The model, the random stream, hooks and the number of threads stay as they were"
        net = small_net()
        before, state, n_threads = bits(net), torch.get_rng_state(), torch.get_num_threads()
        x = torch.zeros(2, 3, 32, 32)
        speed_up(net, x)(x)
        assert_same(bits(net), before)
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == n_threads
        assert net.training and all(not m._forward_pre_hooks and 'forward' not in m.__dict__ for m in net.modules())

    def test_dense(self):
        "Without zeros, PyTorch runs, and the table says so"
        fast = speed_up(small_net(), torch.randn(2, 3, 32, 32))
        assert fast.form.startswith('dense') and set(fast.layers.runs) == {'in PyTorch'}

    def test_table(self):
        net = pruned(small_net())
        fast = speed_up(net, torch.randn(2, 3, 32, 32))
        assert list(fast.layers.layer) == [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert fast.layers.sparsity.between(.85, .95).all()
        assert (fast.layers[['dense_ms', 'sparse_ms']] > 0).all(axis=None)


class TestRefused:
    "Clear errors"
    def test_training(self, fast_and_net):
        fast = copy.deepcopy(fast_and_net[0]).train()
        with pytest.raises(RuntimeError, match='for inference'): fast(torch.randn(1, 3, 32, 32))

    def test_half(self, fast_and_net):
        with pytest.raises(ValueError, match='float32 on a CPU, but 0.0.weight is float16 on cpu'):
            speed_up(small_net().half(), torch.randn(1, 3, 32, 32))
        x = torch.zeros(1, 3, 32, 32)
        with pytest.raises(ValueError, match='got an input of float16 on cpu'): fast_and_net[0](x.half())
        with pytest.raises(ValueError, match='input of float64 on cpu'): speed_up(small_net(), x.double())

    def test_other_device(self):
        x = torch.zeros(1, 3, 32, 32)
        with pytest.raises(ValueError, match='float32 on meta'): speed_up(small_net().to('meta'), x)

    def test_no_tensor(self):
        with pytest.raises(TypeError, match='Inputs are tensors, got list'): speed_up(small_net(), [[1.]])

    def test_no_model(self):
        with pytest.raises(ValueError): speed_up('resnet18', torch.zeros(1))


def test_without_numba(monkeypatch):
    "PyTorch's sparse products, and one warning that says what numba would add"
    monkeypatch.setattr(module, '_regions', lambda: None)
    layers = nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64*36, 400)
    net = pruned(nn.Sequential(*layers))
    x = torch.randn(4, 3, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fast = speed_up(net, x)
    assert sum('Without numba' in str(w.message) for w in caught) == 1
    assert list(fast.layers.layer) == ['0', '4'] and fast.layers.sparse_ms.notna().all()
    assert_near(fast(x), net(x))
    products = module.FastNetwork(net, (x,), 'layers', {'0', '4'}, None)
    assert_near(products(x), net(x))


class TestCosts:
    "The table of costs"
    def test_counts(self):
        net, dense = pruned(small_net(), .9), small_net()
        x = torch.randn(2, 3, 32, 32)
        fast = speed_up(net, x)
        table = costs(dict(dense=dense, sparse=net, fast=fast), x, seconds=.1)
        n_weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        assert (table.parameters == sum(p.numel() for p in net.parameters())).all()
        n_zeros = sum(int((m.weight == 0).sum()) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        assert n_zeros == pytest.approx(.9*n_weights, abs=3)
        assert table.nonzero['sparse'] == sum(int(p.count_nonzero()) for p in net.parameters())
        by_hand = 2*(16*27*32*32 + 32*16*9*16*16 + 32*32*9*16*16 + 32*5)
        assert (table['multiply-adds'] == by_hand).all()
        assert table['without zeros']['dense'] == by_hand
        assert table['without zeros']['fast'] == pytest.approx(.1*by_hand, rel=.01)
        assert table['compressed MB']['sparse'] < .5*table['MB']['sparse']
        assert table['speed-up']['dense'] == 1 and (table.ms > 0).all() and (table.spread >= 0).all()
        assert dense.training, 'a copy is measured'
        axes = plot_costs(table)
        assert [len(ax.patches) for ax in axes] == [3, 3, 3]

    @pytest.mark.parametrize('models', [{}, None, small_net()])
    def test_refused(self, models):
        with pytest.raises(ValueError, match='dictionary of labels'): costs(models, torch.zeros(1, 3, 8, 8))

    def test_learner(self, new_learner):
        learn = new_learner()
        x = learn.dls.one_batch()[0]
        table = costs(dict(a=learn, b=nn.DataParallel(learn.model)), x, seconds=.01)
        assert isinstance(table, pd.DataFrame) and table.parameters.nunique() == 1
