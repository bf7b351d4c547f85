"Plans compute what PyTorch computes, against float64"
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from onecycle_prune.deploy.kernels import width
from onecycle_prune.deploy.plan import Plan
from onecycle_prune.deploy.regions import Region, find_regions, is_layer, layer_region, simplify, trace
from torch import nn

from helpers import all_plans, assert_planned

few = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def threads():
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


def make_sparse(m, density, seed=0):
    "Zero all but a part of the weights; one filter is empty"
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        m.weight *= torch.rand(m.weight.shape, generator=random) < density
        if density < 1: m.weight[0] = 0
    return m.eval().requires_grad_(False)


def assert_near(y, expected):
    "To float32 rounding, relative to the largest output"
    assert y.shape == expected.shape and y.dtype == torch.float32
    if y.numel(): assert (y - expected).abs().max() <= 1e-5*max(1, float(expected.abs().max()))


def run(region, x):
    "The output of a region of one layer, which a plan has computed, and not PyTorch"
    y = region(x)
    assert_planned(region)
    return y


@pytest.fixture(autouse=True)
def used_memory(monkeypatch):
    "The memory of a plan may hold anything when a call begins"
    arena = Plan._arena
    def used(plan):
        memory = arena(plan)
        memory[:] = float('nan')
        return memory
    monkeypatch.setattr(Plan, '_arena', used)


class TestLayers:
    "Single layers"
    sizes = dict(n=st.integers(0, 5), density=st.sampled_from([0, .05, .3, 1]), n_threads=st.integers(1, 3),
        bias=st.booleans(), seed=st.integers(0, 9))

    @few
    @given(groups=st.sampled_from([1, 1, 2, 4]), c_in=st.integers(1, 5), c_out=st.integers(1, 20),
        kernel=st.tuples(*[st.integers(1, 5)]*2), stride=st.tuples(*[st.integers(1, 3)]*2),
        padding=st.tuples(*[st.integers(0, 4)]*2), dilation=st.tuples(*[st.integers(1, 3)]*2),
        shape=st.tuples(*[st.integers(1, 40)]*2), layout=st.sampled_from(['contiguous', 'channels last', 'part']),
        **sizes)
    def test_conv2d(self, groups, c_in, c_out, kernel, stride, padding, dilation, shape, layout, n, density, n_threads,
            bias, seed):
        if any(s + 2*p < d*(k-1) + 1 for s, p, d, k in zip(shape, padding, dilation, kernel)): return
        torch.manual_seed(seed)
        torch.set_num_threads(n_threads)
        m = make_sparse(nn.Conv2d(c_in*groups, c_out*groups, kernel, stride, padding, dilation, groups, bias), density)
        x = torch.randn(n, c_in*groups, *shape)
        if layout == 'channels last': x = x.contiguous(memory_format=torch.channels_last)
        if layout == 'part': x = torch.randn(n, c_in*groups, *[2*s for s in shape])[:, :, ::2, ::2]
        assert_near(run(layer_region(m, 'm'), x), m.double()(x.double()))

    @pytest.mark.parametrize('padding', ['same', 'valid'])
    @pytest.mark.parametrize('kernel', [3, 5, (1, 3)])
    def test_named_padding(self, padding, kernel):
        m = make_sparse(nn.Conv2d(3, 8, kernel, padding=padding, dilation=2), .3)
        x = torch.randn(2, 3, 19, 11)
        assert_near(run(layer_region(m, 'm'), x), m.double()(x.double()))

    def test_left_to_pytorch(self):
        "What a plan would compute in another way"
        assert not is_layer(nn.Conv2d(3, 3, 3, padding=1, padding_mode='reflect'))
        assert not is_layer(nn.Conv2d(3, 3, 2, padding='same'))
        assert not is_layer(nn.Conv2d(3, 3, 3).double()) and not is_layer(nn.Linear(3, 3).half())
        assert not is_layer(nn.ConvTranspose2d(3, 3, 3)) and not is_layer(nn.Conv3d(3, 3, 3)) and not is_layer(None)

    @few
    @given(c_in=st.integers(1, 9), c_out=st.integers(1, 20), kernel=st.integers(1, 9), stride=st.integers(1, 3),
        padding=st.integers(0, 4), length=st.integers(9, 300), **sizes)
    def test_conv1d(self, c_in, c_out, kernel, stride, padding, length, n, density, n_threads, bias, seed):
        torch.manual_seed(seed)
        torch.set_num_threads(n_threads)
        m = make_sparse(nn.Conv1d(c_in, c_out, kernel, stride, padding, bias=bias), density)
        x = torch.randn(n, c_in, length)
        assert_near(run(layer_region(m, 'm'), x), m.double()(x.double()))

    @few
    @given(c_in=st.integers(1, 200), c_out=st.integers(1, 50),
        lead=st.lists(st.integers(0, 70), min_size=0, max_size=2), **sizes)
    def test_linear(self, c_in, c_out, lead, n, density, n_threads, bias, seed):
        torch.manual_seed(seed)
        torch.set_num_threads(n_threads)
        m = make_sparse(nn.Linear(c_in, c_out, bias), density)
        x = torch.randn(*lead, n, c_in)
        assert_near(run(layer_region(m, 'm'), x), m.double()(x.double()))

    @pytest.mark.parametrize('channels', [64, 300])
    def test_slabs(self, channels):
        "Input planes that do not fit into the cache are taken in slabs"
        m = make_sparse(nn.Conv2d(channels, 32, 3, padding=1), .2)
        x = torch.randn(1, channels, 30, 30)
        region = layer_region(m, 'm')
        assert_near(run(region, x), m.double()(x.double()))
        assert region.plan(((channels, 30, 30),)).steps['n_slabs'].max() > 1

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_not_finite(self, value):
        "NaN and infinity reach the outputs that they reach in PyTorch, and no later call"
        m = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval().requires_grad_(False)
        m[0].weight.abs_()
        fast = plans(m, torch.randn(1, 2, 8, 8))
        x = torch.randn(1, 2, 8, 8)
        expected = m(x)
        bad = x.clone()
        bad[0, 0, 3, 3] = value
        torch.testing.assert_close(fast(bad), m(bad), equal_nan=True, rtol=1e-5, atol=1e-5)
        assert not fast(bad).isfinite().all()
        assert_near(fast(x), expected)


def plans(net, *xs):
    "`net` with all its layers in plans"
    traced = simplify(trace(net, xs))
    return find_regions(traced, {f'network.{n}' for n, m in net.named_modules() if is_layer(m)})


def after_conv(*modules, c=6):
    torch.manual_seed(0)
    return nn.Sequential(make_sparse(nn.Conv2d(3, c, 3, padding=1), .5), *modules).eval().requires_grad_(False)


def n_regions(fast): return sum(isinstance(m, Region) for m in fast.modules())


class TestSteps:
    "What plans do between layers"
    pools = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))

    @few
    @given(y=pools, x=pools, shape=st.tuples(*[st.integers(4, 40)]*2), ceil=st.booleans(), is_max=st.booleans())
    def test_pool(self, y, x, shape, ceil, is_max):
        (kernel, stride, padding) = zip(y, x)
        if any(2*p > k for p, k in zip(padding, kernel)): return
        m = (nn.MaxPool2d if is_max else nn.AvgPool2d)(kernel, stride, padding, ceil_mode=ceil and is_max)
        net, x = after_conv(m), torch.randn(2, 3, *shape)
        fast = plans(net, x)
        assert n_regions(fast) == 1 and len(list(fast.graph.nodes)) == 3
        assert_near(fast(x), net(x))
        assert_planned(fast)

    @pytest.mark.parametrize('m', [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-.3, .2), nn.Sigmoid(), nn.SiLU(), nn.Tanh(),
        nn.Hardswish(), nn.Hardsigmoid(), nn.LeakyReLU(.1), nn.ELU(.7), nn.GELU(), nn.GELU('tanh'), nn.Identity(),
        nn.Dropout(), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1),
        nn.AvgPool2d(3, 2, 1)], ids=str)
    def test_module(self, m):
        "Values from -100 to 100, in the same region as the layer before"
        net, x = after_conv(nn.MaxPool2d(2), m), torch.randn(2, 3, 20, 14)*torch.logspace(-2, 2, 14)
        fast = plans(net, x)
        assert len(list(fast.graph.nodes)) == 3
        assert_near(fast(x), net.double()(x.double()))
        assert_planned(fast)

    functions = dict(add=lambda a, b: a+b, iadd=lambda a, b: a.add_(b), relu=lambda a, b: F.relu(a+b),
        cat=lambda a, b: torch.cat([a, b], 1), mul=lambda a, b: a*b, gate=lambda a, b: a*b.mean((2, 3), keepdim=True),
        clamp=lambda a, b: torch.clamp(a, -.5, .2)+b, twice=lambda a, b: a+a, mean=lambda a, b: (a+b).mean([2, 3]),
        permuted=lambda a, b: F.gelu(F.layer_norm(a.permute(0, 2, 3, 1), (6,))).permute(0, 3, 1, 2)+b,
        flat=lambda a, b: torch.flatten(F.adaptive_avg_pool2d(a, 1), 1),
        pooled=lambda a, b: F.max_pool2d(a, 2, stride=2), in_place=lambda a, b: F.relu_(a) + a*b)

    @pytest.mark.parametrize('f', functions.values(), ids=functions)
    def test_function(self, f):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = after_conv()[0], nn.Conv2d(3, 6, 1).requires_grad_(False)
            def forward(self, x): return f(self.a(x), self.b(x))
        net, x = Net().eval(), torch.randn(3, 3, 12, 9)
        fast = plans(net, x)
        assert n_regions(fast) == 1
        assert_near(fast(x), net(x))
        x = torch.randn(1, 3, 7, 8)
        assert_near(fast(x), net(x))
        assert len(all_plans(fast)) == 2
        assert_planned(fast)

    def test_reader_of_a_view(self):
        "What follows a view of an output does not change what others read of it"
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = after_conv()[0], nn.Conv2d(6, 5, 1).requires_grad_(False)
            def forward(self, x):
                y = self.b(F.adaptive_avg_pool2d(self.a(x), 1))
                return torch.relu(torch.flatten(y, 1)) + torch.flatten(torch.tanh(y), 1)
        net, x = Net().eval(), torch.randn(3, 3, 12, 9)
        fast = plans(net, x)
        assert n_regions(fast) == 1 and net.b(F.adaptive_avg_pool2d(net.a(x), 1)).min() < 0
        assert_near(fast(x), net(x))
        assert_planned(fast)

    @pytest.mark.parametrize('shape', [(1, 1), (1, 5), (2, 1), (2, 2), (3, 4)])
    @pytest.mark.parametrize('n_threads', [1, 2])
    def test_small_maps(self, shape, n_threads):
        "Padding is zero around maps of one position too, for each image and in each call"
        torch.set_num_threads(n_threads)
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 4, 3, padding=1, groups=g) for g in (1, 4, 1)]
        net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Hardswish(), nn.MaxPool2d(3, 1, 1), layers[2])
        net.eval().requires_grad_(False)
        fast = plans(net, torch.randn(1, 4, *shape))
        for n in (1, 3, 1, 4, 2):
            x = torch.randn(n, 4, *shape)
            assert_near(fast(x), net(x))
        assert_planned(fast)

    def test_outputs_live_on(self):
        "A later call does not write into an earlier output"
        net = after_conv()
        fast = plans(net, torch.randn(1, 3, 9, 9))
        xs = [torch.randn(2, 3, 9, 9) for _ in range(3)]
        outs = [fast(x) for x in xs]
        for x, y in zip(xs, outs): assert_near(y, net(x))

    def test_inputs_stay(self):
        "An operation in place does not change the input"
        net = nn.Sequential(nn.ReLU(inplace=True), make_sparse(nn.Conv2d(3, 4, 3), .5)).eval()
        x = torch.randn(2, 3, 9, 9)
        before = x.clone()
        fast = plans(net, x.clone())
        fast(x)
        assert torch.equal(x, before)
        assert_near(fast(before.clone()), net(before.clone()))


def test_width():
    "A block is a power of two, so that halves, quarters and eighths are vectors too"
    assert width in (64, 128)
