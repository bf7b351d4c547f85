"Which channels belong together, worked out by hand for small networks, and which numbers are always the same"
import random

import numpy as np, pytest, torch, torch.nn.functional as F, torchvision
from onecycle_prune.channels import Channels, Tracer, compact, function_name, record_mode
from onecycle_prune.layers import tensor_names
from torch import nn

from helpers import assert_same, bits
from networks import tiny_net


class Net(nn.Module):
    "The modules `a`, `b` and others, and a function that calls them"
    def __init__(self, call, **modules):
        super().__init__()
        self.call = call
        for name, m in modules.items(): setattr(self, name, m)

    def forward(self, *xs): return self.call(self, *xs)


def channels(call, *xs, **modules): return Channels(Net(call, **modules), xs or (torch.randn(2, 4),))


def together(found, *names):
    "For each index along the axis of outputs of the first layer, the indices of the others in the same channel"
    firsts, *others = [found.axes[name].tolist() for name in names]
    return [tuple([i for i, o in enumerate(other) if o == first] for other in others) for first in firsts]


a, b = ('a.weight', 0), ('b.weight', 0)
read = ('last.weight', 1)


def lines(**sizes): return {k: nn.Linear(*v) for k, v in sizes.items()}


class TestTogether:
    "Channels that are removed together"
    def test_sequence(self):
        found = channels(lambda m, x: m.last(m.a(x).relu()), **lines(a=(4, 3), last=(3, 2)))
        assert together(found, a, read, ('a.bias', 0)) == [([i], [i]) for i in range(3)]

    def test_addition(self):
        found = channels(lambda m, x: m.last(m.a(x) + m.b(x)), **lines(a=(4, 3), b=(4, 3), last=(3, 2)))
        assert together(found, a, b, read) == [([i], [i]) for i in range(3)]

    def test_broadcast(self):
        "One channel is added to all"
        found = channels(lambda m, x: m.last(m.a(x) + m.b(x)), **lines(a=(4, 3), b=(4, 1), last=(3, 2)))
        assert together(found, b, a, read) == [([0, 1, 2], [0, 1, 2])]

    def test_concatenation(self):
        found = channels(lambda m, x: m.last(torch.cat([m.a(x), m.b(x), m.a(x)], 1)),
            **lines(a=(4, 2), b=(4, 3), last=(7, 2)))
        assert together(found, a, read) == [([0, 5],), ([1, 6],)]
        assert together(found, b, read) == [([2],), ([3],), ([4],)]

    def test_flatten(self):
        conv = nn.Conv1d(4, 3, 1)
        found = channels(lambda m, x: m.last(m.a(x).flatten(1)), torch.randn(2, 4, 2), a=conv, last=nn.Linear(6, 2))
        assert together(found, a, read) == [([0, 1],), ([2, 3],), ([4, 5],)]

    def test_norm(self):
        net = nn.Sequential(nn.Conv1d(4, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 1, 1))
        found = Channels(net, (torch.randn(2, 4, 5),))
        names = ['weight', 'bias', 'running_mean', 'running_var']
        assert together(found, ('0.weight', 0), *[(f'1.{o}', 0) for o in names]) == [([i],)*4 for i in range(3)]

    def test_groups(self):
        "Channels at the same place of each group"
        net = nn.Sequential(nn.Conv1d(4, 6, 1), nn.Conv1d(6, 4, 1, groups=2), nn.Conv1d(4, 1, 1))
        found = Channels(net, (torch.randn(2, 4, 5),))
        assert together(found, ('0.weight', 0), ('0.weight', 0), ('1.weight', 1))[:3] == [
            ([0, 3], [0]), ([1, 4], [1]), ([2, 5], [2])]
        assert together(found, ('1.weight', 0), ('1.weight', 0))[:2] == [([0, 2],), ([1, 3],)]

    def test_depthwise(self):
        "Two output channels for each input channel"
        net = nn.Sequential(nn.Conv1d(4, 3, 1), nn.Conv1d(3, 6, 1, groups=3), nn.Conv1d(6, 1, 1))
        found = Channels(net, (torch.randn(2, 4, 5),))
        pairs = [([2*i, 2*i+1], [2*i, 2*i+1]) for i in range(3)]
        assert together(found, ('0.weight', 0), ('1.weight', 0), ('2.weight', 1)) == pairs
        assert ('1.weight', 1) not in found.axes

    def test_depthwise_transposed(self):
        net = nn.Sequential(nn.Conv1d(4, 3, 1), nn.ConvTranspose1d(3, 3, 2, groups=3), nn.Conv1d(3, 1, 1))
        found = Channels(net, (torch.randn(2, 4, 5),))
        assert together(found, ('0.weight', 0), ('1.weight', 0), ('2.weight', 1)) == [([i], [i]) for i in range(3)]

    def test_module_used_twice(self):
        found = channels(lambda m, x: m.last(m.b(m.b(m.a(x)))), **lines(a=(4, 3), b=(3, 3), last=(3, 2)))
        assert together(found, a, b, ('b.weight', 1), read) == [([i], [i], [i]) for i in range(3)]

    def test_parameter(self):
        "A parameter without a layer, such as a scale of each channel, or positions"
        modules = lines(a=(4, 3), last=(3, 2))
        net = Net(lambda m, x: m.last(m.a(x)*m.scale + m.positions), **modules)
        net.scale, net.positions = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1, 5, 3))
        found = Channels(net, (torch.randn(2, 5, 4),))
        assert together(found, a, ('scale', 0), ('positions', 2)) == [([i], [i]) for i in range(3)]

    def test_channel_shuffle(self):
        def shuffle(m, x):
            x = m.a(x)
            return m.last(x.view(len(x), 2, x.shape[1]//2).transpose(1, 2).flatten(1))
        found = channels(shuffle, **lines(a=(4, 6), last=(6, 2)))
        assert together(found, a, a, read)[:3] == [([0, 3], [0, 1]), ([1, 4], [2, 3]), ([2, 5], [4, 5])]

    def test_classes_are_complete(self):
        "Each index of each axis is in one of the coupled channels"
        found = Channels(tiny_net(), (torch.randn(2, 4, 6, 6),))
        groups = [group for o in found.coupled() for group in (o.writers, o.readers)]
        places = [(k, i) for group in groups for k, v in group.items() for i in v]
        assert len(places) == len(set(places))
        assert set(places) == {(k, i) for k, v in found.axes.items() for i in range(len(v))}


class TestReasons:
    "Why a channel cannot be removed"
    @pytest.mark.parametrize('call,reason', [
        (lambda m, x: m.last(m.a(x)), 'in use'),
        (lambda m, x: (m.last(m.a(x)), m.a(x)), 'output of the model'),
        (lambda m, x: m.last(F.layer_norm(m.a(x), (3,))), 'layer_norm mixes channels'),
        (lambda m, x: m.last(m.a(x).softmax(-1)), 'softmax mixes channels'),
        (lambda m, x: m.last(m.a(x) - m.a(x).mean(1, keepdim=True)), 'mean mixes channels'),
        (lambda m, x: m.last(m.a(x) @ torch.eye(3)), 'matmul may mix channels'),
        (lambda m, x: m.last(m.a(x)[:, [0, 2, 2]]), 'getitem takes channels by their numbers'),
        (lambda m, x: m.last(m.a(x)) + x[:, :2], 'in use')])
    def test_reason(self, call, reason):
        found = channels(call, **lines(a=(4, 3), last=(3, 2)))
        assert found.why('a.weight') == reason
        assert not found.kept()

    def test_attention(self):
        found = channels(lambda m, x: m.last(m.b(*[m.a(x)]*3)[0]), torch.randn(5, 2, 4), a=nn.Linear(4, 8),
            b=nn.MultiheadAttention(8, 2), last=nn.Linear(8, 2))
        reason = 'multi_head_attention_forward has a fixed width'
        assert found.why('a.weight') == found.why('b.out_proj.weight') == reason
        assert found.why('b.in_proj_weight') == 'in use'

    def test_not_used(self):
        found = channels(lambda m, x: m.last(x), **lines(a=(4, 3), last=(4, 2)))
        assert found.why('a.weight') == 'not used'

    def test_careful(self):
        "A number in the code may be a number of channels"
        net = Net(lambda m, x: m.last(m.a(x).view(-1, 3)), **lines(a=(4, 3), last=(3, 2)))
        with torch.no_grad(): net.a.weight[0], net.a.bias[0] = 0, 0
        xs = torch.randn(2, 4),
        assert Channels(net, xs).kept()['a.weight'] == {0: [1, 2]}
        assert Channels(net, xs, careful=True).why('a.weight') == 'view gives the number of channels'

    def test_training_mode(self):
        "A layer that only training uses needs channels; a failure is noted"
        def call(m, x): return (m.b(m.a(x)), m.last(m.a(x))) if m.training else m.last(m.a(x))
        net = Net(call, **lines(a=(4, 3), b=(3, 2), last=(3, 2)))
        with torch.no_grad(): net.last.weight.zero_()
        found = Channels(net.eval(), (torch.randn(2, 4),))
        assert found.why('a.weight') == 'in use' and not found.training_error
        net.b = None
        found = Channels(net, (torch.randn(2, 4),))
        assert 'NoneType' in found.training_error and found.kept()['a.weight'] == {0: [0]}


class TestKnown:
    "Which numbers are always the same"
    def values(self, net, *xs):
        "The values of the output, as a list; None if they are not known"
        tracer = Tracer(tensor_names(net))
        calls, outputs = record_mode(net, xs or (torch.randn(2, 3),), {}, False)
        with torch.no_grad(): tracer.follow(calls, outputs)
        found = tracer.values(outputs[0]).expand(outputs[0].shape)[0].flatten()
        return [None if o != o else o for o in found.tolist()]

    def layer(self, *bias):
        "Only the last output depends on the input"
        m = nn.Linear(3, len(bias))
        with torch.no_grad():
            m.weight[:-1] = 0
            m.bias.copy_(torch.tensor(bias))
        return m

    @pytest.mark.parametrize('after,expected', [
        (nn.Identity(), [0, -2, None]), (nn.ReLU(), [0, 0, None]), (nn.Hardsigmoid(), [.5, .5 - 1/3, None]),
        (nn.Dropout(.5), [0, None, None]), (nn.Softmax(1), [None]*3), (nn.PReLU(), [0, None, None]),
        (nn.LayerNorm(3), [None]*3), (nn.GLU(), None), (nn.Unflatten(1, (3, 1)), [0, -2, None])])
    def test_function(self, after, expected):
        if expected is None: expected, layer = [0, None], self.layer(0., 1., 2., 3.)
        else: layer = self.layer(0., -2., 1.)
        assert self.values(nn.Sequential(layer, after)) == pytest.approx(expected)

    @pytest.mark.parametrize('weight,bias,mean,expected', [
        (1., 0., 0., 0), (1., 2., 0., 2), (1., 0., 1., None), (0., 0., 1., 0), (0., 3., 1., 3)])
    def test_norm(self, weight, bias, mean, expected):
        "Both with the statistics of the batch and with the running ones"
        norm = nn.BatchNorm1d(2).eval()
        with torch.no_grad(): norm.weight[:], norm.bias[:], norm.running_mean[:] = weight, bias, mean
        found = self.values(nn.Sequential(self.layer(0., 0.), norm))
        assert found == [expected, bias if weight == 0 else None]

    def test_bias(self):
        "Zeros that meet zero weights, and an input that is not read"
        net = nn.Sequential(self.layer(0., 0., 0.), nn.Linear(3, 2))
        with torch.no_grad(): net[1].weight[0, 2], net[1].bias[0] = 0, 5
        assert self.values(net) == [5, None]

    def test_random(self):
        "Random numbers are not known, not even zeros"
        class Drop(nn.Module):
            def forward(self, x): return x*x.new_empty(len(x), 1).bernoulli_(0.)
        assert self.values(nn.Sequential(self.layer(0., 1., 2.), Drop())) == [0, None, None]

    @pytest.mark.parametrize('name', ['mobilenet_v3_small', 'shufflenet_v2_x0_5'])
    def test_holds_for_other_inputs(self, name):
        "In all calls of a network with silent channels"
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)(num_classes=5).eval()
        with torch.no_grad():
            for m in net.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.weight[::2] = 0
                    nn.init.normal_(m.bias)
        tracer = Tracer(tensor_names(net))
        records = [record_mode(net, (torch.randn(2, 3, 32, 32),), {}, False) for _ in range(2)]
        with torch.no_grad(): tracer.follow(*records[0])
        n_known = 0
        for first, second in zip(*(calls for calls, _ in records)):
            if not isinstance(first.result, torch.Tensor) or id(first.result) not in tracer.states: continue
            values = tracer.values(first.result).expand(first.result.shape)
            is_known = ~values.isnan()
            # A later call may have changed this tensor in place. Then the state is of that call, as the tensor is.
            torch.testing.assert_close(second.result[is_known], values[is_known].float())
            n_known += int(is_known.sum())
        assert n_known > 1000


class TestLeavesAlone:
    "The model and the random states are as before"
    def test_model(self):
        net = tiny_net().train()
        net[1].eval()
        before, modes = bits(net), [m.training for m in net.modules()]
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        Channels(net, (torch.randn(2, 4, 6, 6, generator=torch.Generator()),))
        assert_same(bits(net), before)
        assert [m.training for m in net.modules()] == modes
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

    def test_wrapped(self):
        net, x = tiny_net(), torch.randn(2, 4, 6, 6)
        assert Channels(nn.DataParallel(net), (x,)).axes.keys() == Channels(net, (x,)).axes.keys()

    def test_error(self):
        with pytest.raises(ValueError, match='it fails with these inputs'): Channels(tiny_net(), (torch.ones(2, 3),))


def test_function_name():
    names = torch.Tensor.__radd__, torch.Tensor.mul_, torch.Tensor.T.__get__, F.max_pool2d
    assert [function_name(o) for o in names] == ['add', 'mul', 'T', 'max_pool2d']


def test_compact():
    "The tensor broadcasts to what it was, and no axis without a change is left"
    t = torch.tensor([1., float('nan'), 3])[None, :, None].expand(2, 3, 4)
    assert compact(t).shape == (1, 3, 1)
    assert_same(compact(t).expand(2, 3, 4), t)
    assert compact(torch.empty(0, 3)).expand(0, 3).shape == (0, 3)
