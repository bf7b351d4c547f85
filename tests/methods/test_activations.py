"Activations with learned scales: their formulas, their gradients, and the places where they replace others"
import copy, math, pickle

import pytest, torch, torch.nn.functional as F
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.deploy.costs import costs
from onecycle_prune.deploy.speed_up import speed_up
from onecycle_prune.layers import prunable
from onecycle_prune.methods.activations import ScaledActivation, activations, replace_activations, replaced_classes
from torch import nn, tensor
from torchvision.models import resnet18

from helpers import assert_same, bits
from networks import tiny_data, tiny_images

# With Python's own functions, for one number.
by_hand = dict(
    relu=lambda x: max(x, 0),
    swish=lambda x: x/(1 + math.exp(-x)),
    srs=lambda x: x/(x/2 + math.exp(-x/3)),
    tanhsoft1=lambda x: math.tanh(.87*x)*math.log(1 + math.exp(x)),
    tanhsoft2=lambda x: x*math.tanh(.6*math.exp(x)))
points = [-7., -2.5, -1., -.1, .3, 1., 4., 9.]


def test_all_named(): assert set(activations) == set(by_hand)


def scaled(g, a, b):
    m = ScaledActivation(g).double()
    with torch.no_grad(): m.a.fill_(a), m.b.fill_(b)
    return m


class TestFormulas:
    @pytest.mark.parametrize('a,b', [(1., 1.), (1.5, .7), (-.5, -2.)])
    @pytest.mark.parametrize('g', by_hand)
    def test_values(self, g, a, b):
        expected = [a*by_hand[g](b*x) for x in points]
        assert scaled(g, a, b)(tensor(points, dtype=torch.float64)).tolist() == pytest.approx(expected, rel=1e-12)

    def test_published(self):
        "The least value of SRS is αβ/(β - αe), and its limit is α = 2"
        x = torch.linspace(-30, 3000, 2000001, dtype=torch.float64)
        values = activations['srs'](x)
        assert float(values.min()) == pytest.approx(6/(3 - 2*math.e), rel=1e-6)
        assert float(values.max()) <= 2 and float(values[-1]) == pytest.approx(2)

    @pytest.mark.parametrize('g', by_hand)
    def test_gradients(self, g):
        "The gradients of a, b and x are those of finite differences in float64"
        a, b, w = 1.3, .8, 1e-6
        m, x = scaled(g, a, b), tensor(points, dtype=torch.float64, requires_grad=True)
        m(x).sum().backward()
        def _sum(a, b): return sum(a*by_hand[g](b*v) for v in points)
        assert float(m.a.grad) == pytest.approx(_sum(1, b), rel=1e-9)
        assert float(m.b.grad) == pytest.approx((_sum(a, b + w) - _sum(a, b - w))/(2*w), rel=1e-6)
        slopes = [a*(by_hand[g](b*(v + w)) - by_hand[g](b*(v - w)))/(2*w) for v in points]
        assert x.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-8)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize('g', by_hand)
    def test_extremes(self, g, dtype):
        "Large inputs give finite values and gradients"
        m, x = ScaledActivation(g).to(dtype), tensor([-1e6, -300, 300, 1e6], dtype=dtype, requires_grad=True)
        y = m(x)
        y.sum().backward()
        for t in (y, x.grad, m.a.grad, m.b.grad): assert t.isfinite().all()
        assert abs(float(y[0])) < 1e-6 and float(y[3]) == pytest.approx(2 if g == 'srs' else 1e6, rel=1e-2)

    def test_start(self):
        m = ScaledActivation()
        assert {k: (p.shape, float(p)) for k, p in m.named_parameters()} == dict(a=((), 1), b=((), 1))
        assert_same(m(tensor(points)), F.silu(tensor(points)))

    def test_function(self):
        "Any function of a tensor can have scales"
        assert_same(ScaledActivation(torch.sin)(tensor(points)), tensor(points).sin())

    @pytest.mark.parametrize('wrong,right', [
        ('swich', 'swish'), ('silu', 'swish'), ('Tanhsoft', 'tanhsoft1'), ('soft_root_sign', 'srs')])
    def test_unknown(self, wrong, right):
        with pytest.raises(ValueError, match=f"Unknown activation: '{wrong}'. Did you mean '{right}'"):
            ScaledActivation(wrong)

    @pytest.mark.parametrize('wrong', [nn.GELU, None, 3])
    def test_no_function(self, wrong):
        with pytest.raises(ValueError, match='Unknown activation.*relu, swish, srs.*function of a tensor'):
            ScaledActivation(wrong)

    def test_repr(self): assert repr(scaled('srs', 2, .5)) == 'ScaledActivation(soft_root_sign, a=2, b=0.5)'


def net_with(act=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), act(), nn.Sequential(nn.Conv2d(8, 8, 3), nn.GELU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.Sigmoid())


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
    def forward(self, x): return F.relu(self.layer(x))


class TestReplace:
    @pytest.mark.parametrize('cls', replaced_classes)
    def test_places(self, cls):
        net = net_with(cls)
        others = {n: m for n, m in net.named_modules() if n not in ('2', '3.1')}
        assert replace_activations(net, 'srs') == ['2', '3.1']
        for m in (net[2], net[3][1]): assert type(m) is ScaledActivation and m.function is activations['srs']
        assert net[2].a is not net[3][1].a
        assert {n: m for n, m in net.named_modules() if n not in ('2', '3.1')} == others

    def test_same_outputs(self):
        "A ReLU with scales at 1 gives the same outputs"
        net, x = net_with(), tiny_images()
        net[3][1] = nn.ReLU()
        before = net.eval()(x)
        replace_activations(net, 'relu')
        assert_same(net(x), before)
        assert not any(m.training for m in net.modules())

    def test_shared(self):
        "A module in two places is one module afterwards, and so is the one that a block of torchvision calls twice"
        act = nn.ReLU()
        net = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
        assert replace_activations(net) == ['1', '3'] and net[1] is net[3] and len(list(net.parameters())) == 6
        net = resnet18(num_classes=2)
        names = replace_activations(net)
        assert names == ['relu'] + [f'layer{i}.{j}.relu' for i in range(1, 5) for j in range(2)]
        calls = []
        net.layer1[0].relu.register_forward_hook(lambda *args: calls.append(1))
        net(torch.randn(2, 3, 32, 32))
        assert len(calls) == 2

    def test_dtype(self):
        net = net_with().double()
        replace_activations(net)
        assert {p.dtype for p in net.parameters()} == {torch.float64}

    def test_wrapped(self):
        net = nn.DataParallel(net_with())
        assert replace_activations(net) == ['2', '3.1'] and type(net.module[2]) is ScaledActivation

    @pytest.mark.parametrize('net', [Functional(), nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), nn.ReLU()])
    def test_none(self, net):
        kind = type(net).__name__
        with pytest.raises(ValueError, match=f'{kind} contains no activation module.*ReLU.*F.relu, cannot be replaced'):
            replace_activations(net)

    def test_unknown(self):
        "An unknown function raises before anything changes"
        net = net_with()
        with pytest.raises(ValueError, match='Unknown activation'): replace_activations(net, 'swich')
        assert type(net[2]) is nn.ReLU
        with pytest.raises(ValueError, match='A model is an nn.Module'): replace_activations(nn.ReLU)

    def test_again(self):
        net = net_with()
        replace_activations(net, 'relu')
        replace_activations(net, 'srs')
        assert net[2].function is activations['srs']


class TestModel:
    @pytest.fixture
    def trained(self, new_learner):
        "A learner whose scales have been trained, with pruning"
        learn = new_learner(net_with())
        learn.fit(1) # with an optimizer that does not know the scales
        assert replace_activations(learn, 'swish') == ['2', '3.1']
        learn.fit_one_cycle(2, 1e-1, cbs=SparsifyCallback(.98))
        return learn

    def test_learned(self, trained):
        "A learner trains the scales, and prunes all but them"
        for m in (trained.model[2], trained.model[3][1]):
            for p in m.parameters(): assert p != 0 and p != 1
        layers = prunable(trained.model, optional=True)
        assert list(layers) == ['0', '3.0', '6']
        total, zeros = (sum(f(m.weight) for m in layers.values()) for f in (torch.numel, lambda w: int((w == 0).sum())))
        assert zeros == round(.98*total)

    @pytest.mark.parametrize('copied', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
    def test_copies(self, trained, copied):
        net = trained.model.eval()
        other = copied(net)
        assert_same(other(tiny_images()*0 + 1), net(tiny_images()*0 + 1))
        assert_same(bits(other), bits(net))
        assert other[2].a is not net[2].a

    def test_state_dict(self, trained):
        net = net_with().eval()
        replace_activations(net, 'swish')
        state = trained.model.state_dict()
        assert {'2.a', '2.b', '3.1.a', '3.1.b'} <= state.keys()
        net.load_state_dict(state)
        x, _ = tiny_data()
        assert_same(net(x), trained.model.eval()(x))

    @pytest.mark.parametrize('g', by_hand)
    def test_deployed(self, g):
        "`speed_up` computes the same, and `costs` counts the scales"
        net, x = net_with().eval(), tiny_images()
        replace_activations(net, g)
        with torch.no_grad():
            for m in (net[0], net[3][0]): m.weight[torch.rand(m.weight.shape) < .95] = 0
            for m in (net[2], net[3][1]): m.a.fill_(1.7), m.b.fill_(.6)
        fast = speed_up(net, x)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-6)
        plain = sum(p.numel() for p in net_with().parameters())
        assert costs(dict(fast=fast), x, seconds=.05).parameters.tolist() == [plain + 4]
