"What one forward pass shows: the norms after a filter, and the weights that are not used as they are."
import copy, gc, pickle, random, weakref

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.vision.models.xresnet import xresnet18
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.layers import prunable
from onecycle_prune.observe import computed_weights, filter_tensors, record_calls
from onecycle_prune.sparsifier import Sparsifier
from torch import nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from helpers import assert_same, bits, channel
from networks import tiny_net, total_weights
from reference import total_zeros


def convolutions(net): return {n: m for n, m in prunable(net).items() if isinstance(m, nn.modules.conv._ConvNd)}


def observed(net, x=None):
    "Names of the tensors after each convolution, without its bias, and the layers whose filters are not silent"
    layers = convolutions(net)
    first = next(iter(layers.values()))
    if x is None: x = torch.randn(4, first.in_channels, *[32]*(first.weight.ndim - 2))
    calls = record_calls(net, (x,))
    tensors, not_silent = filter_tensors(calls, net, layers, {n: m.out_channels for n, m in layers.items()})
    return {n: [t.name for t in ts if t.tensor is not layers[n].bias] for n, ts in tensors.items()}, not_silent


def norms(net, x=None):
    "{name of a layer: names of the norms after it}, where all filters are silent"
    found, not_silent = observed(net, x)
    assert not not_silent
    return {n: list(dict.fromkeys(o.rpartition('.')[0] for o in names)) for n, names in found.items() if names}


class TestNetworks:
    "Lists written by hand"

    def test_resnet18(self):
        inner = [f'layer{l}.{b}.{{}}{c}' for l in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)]
        blocks = {o.format('conv'): [o.format('bn')] for o in inner}
        downs = {f'layer{l}.0.downsample.0': [f'layer{l}.0.downsample.1'] for l in (2, 3, 4)}
        assert norms(models.resnet18()) == {'conv1': ['bn1']} | blocks | downs

    def test_vgg16_bn(self):
        convs = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]  # conv, bn, relu, and sometimes a max pooling
        assert norms(models.vgg16_bn().features) == {f'{i}': [f'{i+1}'] for i in convs}

    def test_mobilenet_v2(self):
        expected = {'features.0.0': ['features.0.1'], 'features.18.0': ['features.18.1'],
                    # the first block does not expand: depthwise, then pointwise
                    'features.1.conv.0.0': ['features.1.conv.0.1'], 'features.1.conv.1': ['features.1.conv.2']}
        for i in range(2, 18):
            b = f'features.{i}.conv'
            expected |= {f'{b}.0.0': [f'{b}.0.1'], f'{b}.1.0': [f'{b}.1.1'], f'{b}.2': [f'{b}.3']}
        assert norms(models.mobilenet_v2()) == expected

    def test_densenet(self):
        "Outputs are concatenated before norms read them: each layer has its part of all later norms of the block"
        net = models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8)
        b1, b2, t = 'features.denseblock1.denselayer', 'features.denseblock2.denselayer', 'features.transition1'
        after = {'features.conv0': ['features.norm0', f'{b1}1.norm1', f'{b1}2.norm1', f'{t}.norm'],
            f'{b1}1.conv1': [f'{b1}1.norm2'], f'{b1}1.conv2': [f'{b1}2.norm1', f'{t}.norm'],
            f'{b1}2.conv1': [f'{b1}2.norm2'], f'{b1}2.conv2': [f'{t}.norm'],
            f'{t}.conv': [f'{b2}1.norm1', f'{b2}2.norm1', 'features.norm5'],
            f'{b2}1.conv1': [f'{b2}1.norm2'], f'{b2}1.conv2': [f'{b2}2.norm1', 'features.norm5'],
            f'{b2}2.conv1': [f'{b2}2.norm2'], f'{b2}2.conv2': ['features.norm5']}
        assert norms(net) == after

    def test_convnext(self):
        "Layer norms over the channels, after a permutation"
        found = norms(models.convnext_tiny())
        assert found['features.0.0'] == ['features.0.1'] and found['features.1.0.block.0'] == ['features.1.0.block.2']

    def test_xresnet(self):
        found = norms(xresnet18(n_out=4))
        assert len(found) == 22 and found['0.0'] == ['0.1']


class After(nn.Module):
    "A convolution of 6 filters, followed by `f(self, x)`"
    def __init__(self, f, **modules):
        super().__init__()
        self.conv, self.f = nn.Conv2d(3, 6, 3), f
        for n, m in modules.items(): setattr(self, n, m)
    def forward(self, x): return self.f(self, self.conv(x))


def with_assert(s, x):
    assert x.shape[1] == 6
    return s.bn(x) if x.mean() < 1e9 else x


def with_loop(s, x):
    for m in s.list[:max(1, x.shape[-1]//1000 + 3)]: x = m(x)
    return x


class MyAffine(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(1, 6, 1, 1)), nn.Parameter(torch.ones(1, 6, 1, 1))
    def forward(self, x): return x*self.scale + self.shift


class ChannelsLastNorm(nn.LayerNorm):
    "As timm's LayerNorm2d"
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class NormAct(nn.BatchNorm2d):
    "As timm's BatchNormAct2d"
    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum)
        return F.silu(F.dropout(x, .1, self.training))


def bn(**kwargs): return nn.BatchNorm2d(6, **kwargs)


def fixed(value): return nn.Parameter(torch.full((6,), value), requires_grad=False)


silent = {
    'direct': (lambda s, x: s.bn(x), dict(bn=bn())), 'relu': (lambda s, x: s.bn(F.relu(x)), dict(bn=bn())),
    'in place': (lambda s, x: s.bn(x.relu_()), dict(bn=bn())),
    'dropout': (lambda s, x: s.bn(F.dropout(F.gelu(x), .5)), dict(bn=bn())),
    'sigmoid': (lambda s, x: s.bn(torch.sigmoid(x)), dict(bn=bn())),
    'hardtanh': (lambda s, x: s.bn(F.hardtanh(x)), dict(bn=bn())),
    'max pool': (lambda s, x: s.bn(F.max_pool2d(x, 2)), dict(bn=bn())),
    'average pool': (lambda s, x: s.bn(F.adaptive_avg_pool2d(x, 3)), dict(bn=bn())),
    'upsampling': (lambda s, x: s.bn(F.interpolate(x, scale_factor=2, mode='bilinear')), dict(bn=bn())),
    'padding': (lambda s, x: s.bn(F.pad(x, (1, 1, 1, 1), value=2.)), dict(bn=bn())),
    'own function': (lambda s, x: s.bn(x.abs().pow(1.5)), dict(bn=bn())),
    'two norms': (lambda s, x: s.bn(x) + s.bn2(x), dict(bn=bn(), bn2=bn())),
    'one after the other': (lambda s, x: s.bn2(s.bn(x)), dict(bn=bn(), bn2=bn())),
    'branch': (lambda s, x: s.bn(x) + x, dict(bn=bn())),
    'assert and if': (with_assert, dict(bn=bn())),
    'loop': (with_loop, dict(list=nn.ModuleList([nn.ReLU(), nn.Identity(), bn()]))),
    'functional': (lambda s, x: F.batch_norm(x, s.mean, s.var, s.w, s.b, s.training),
                   dict(mean=fixed(0.), var=fixed(1.), w=nn.Parameter(torch.ones(6)), b=nn.Parameter(torch.ones(6)))),
    'without affine': (lambda s, x: s.bn(x), dict(bn=bn(affine=False))),
    'without statistics': (lambda s, x: s.bn(x), dict(bn=bn(track_running_stats=False))),
    'group norm': (lambda s, x: s.gn(x), dict(gn=nn.GroupNorm(2, 6))),
    'instance norm': (lambda s, x: s.n(x), dict(n=nn.InstanceNorm2d(6, affine=True, track_running_stats=True))),
    'instance norm without affine': (lambda s, x: s.n(x), dict(n=nn.InstanceNorm2d(6, track_running_stats=True))),
    'plain instance norm': (lambda s, x: s.n(x), dict(n=nn.InstanceNorm2d(6))),
    'layer norm over channels': (lambda s, x: s.ln(x.permute(0, 2, 3, 1)), dict(ln=nn.LayerNorm(6))),
    'layer norm over all': (lambda s, x: s.ln(x), dict(ln=nn.LayerNorm((6, 10, 10)))),
    'layer norm, channels last': (lambda s, x: s.ln(x), dict(ln=ChannelsLastNorm(6))),
    'frozen': (lambda s, x: s.bn(x), dict(bn=FrozenBatchNorm2d(6))),
    'norm and activation': (lambda s, x: s.bn(x), dict(bn=NormAct(6))),
    'own affine': (lambda s, x: s.a(F.relu(x)), dict(a=MyAffine())),
    'sync': (lambda s, x: s.bn(x), dict(bn=nn.SyncBatchNorm(6))),
    'shared by nothing else': (lambda s, x: s.bn(x) + s.bn(x), dict(bn=bn())),
    'stochastic depth': (lambda s, x: s.bn(s.d(x)), dict(bn=bn(), d=StochasticDepth(.1, 'row')))}


def weaken(conv, weak=(1, 2, 5)):
    "Make some filters the smallest ones"
    with torch.no_grad():
        for c in range(conv.out_channels): channel(conv, c).fill_(.01 if c in weak else 1.)
    return list(weak)


def randomize(net):
    "Learned values for all biases and norms"
    for n, t in (*net.named_parameters(), *net.named_buffers()):
        if t.is_floating_point() and not n.endswith('conv.weight'): t.data.uniform_(.5, 2)


@pytest.mark.parametrize('f,modules', silent.values(), ids=silent)
def test_silent(f, modules):
    "The output of the norms is zero in pruned channels, in training and in evaluation, whatever they had learned"
    net = After(f, **copy.deepcopy(modules))
    randomize(net)
    weak = weaken(net.conv)
    seen = {}
    sp = Sparsifier(net, 'filter', layers='conv')
    net(torch.rand(4, 3, 12, 12)) # the first forward pass
    sp.prune(.5)
    for n in modules:
        getattr(net, n).register_forward_hook(lambda m, x, y, n=n: seen.setdefault(n, y)) if isinstance(
            getattr(net, n), nn.Module) else None
    for training in (False, True):
        seen.clear()
        out = net.train(training)(torch.rand(4, 3, 12, 12))
        results = [y for n, y in seen.items() if n != 'd'] or [out]
        for y in results:
            y = y if y.shape[1] == 6 else y.permute(0, 3, 1, 2)
            zero = [c for c in range(6) if not y[:, c].any()]
            assert zero == weak


mixed = {
    'group norm': (lambda s, x: s.n(x), dict(n=nn.GroupNorm(2, 6, affine=False))),
    'layer norm': (lambda s, x: s.n(x.permute(0, 2, 3, 1)), dict(n=nn.LayerNorm(6, elementwise_affine=False))),
    'functional': (lambda s, x: F.layer_norm(x, x.shape[1:]), {}),
    'shared': (lambda s, x: s.n(x) + s.n(s.other(x)), dict(n=bn(), other=nn.Conv2d(6, 6, 1)))}


@pytest.mark.parametrize('f,modules', mixed.values(), ids=mixed)
def test_not_silent(f, modules):
    "A norm that mixes channels, or belongs to two layers: one warning names the layers, and nothing else is zeroed"
    net = After(f, **copy.deepcopy(modules))
    sp = Sparsifier(net, 'filter')
    with pytest.warns(UserWarning, match='not silent: conv') as caught: net(torch.randn(4, 3, 12, 12))
    net(torch.randn(4, 3, 12, 12))
    assert len(caught) == 1
    sp.prune(.5)
    assert all(t.any() and (t != 0).all() for n, t in net.named_parameters() if n.startswith('n.') and 'weight' in n)


nothing = {
    'none': lambda s, x: x, 'added': lambda s, x: s.bn(x + x.mean()), 'gated': lambda s, x: x*torch.sigmoid(x),
    'other input': lambda s, x: s.bn(torch.ones_like(x)), 'softplus': lambda s, x: F.softplus(x)}


@pytest.mark.parametrize('f', nothing.values(), ids=nothing)
def test_nothing_found(f):
    "Where the way of a filter ends before a norm, no tensor is found, and there is no warning"
    assert observed(After(f, bn=bn())) == ({'conv': []}, [])


@pytest.mark.parametrize('f', [lambda s, x: s.bn(x.flip(1)), lambda s, x: s.bn(F.channel_shuffle(x, 2))])
def test_other_order(f):
    "A norm that has the channels in another order is not zeroed in the wrong places"
    assert observed(After(f, bn=bn()))[0] == {'conv': []}


def test_concatenated():
    "Each of two layers has its part of a norm after their concatenation"
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.BatchNorm2d(10)
        def forward(self, x): return self.bn(torch.cat([self.a(x), F.relu(self.b(x))], 1))
    net = Two()
    randomize(net)
    a, b = weaken(net.a, (1, 2)), weaken(net.b, (0, 3, 5))
    sp = Sparsifier(net, 'filter')
    net(torch.randn(2, 3, 4, 4))
    sp.prune(.5)
    out = net.eval()(torch.rand(2, 3, 4, 4))
    assert [c for c in range(10) if not out[:, c].any()] == [*a, *(4 + c for c in b)]


def test_fused_norm():
    "A convolution with its batch norm inside, as for training with quantization"
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import get_default_qat_qconfig
    net = nn.Sequential(ConvBn2d(3, 6, 3, qconfig=get_default_qat_qconfig()))
    weak = weaken(net[0])
    net[0].bn.bias.data.fill_(1.)
    sp = Sparsifier(net, 'filter')
    x = torch.randn(4, 3, 8, 8)
    net(x)
    sp.prune(.5)
    for training in (True, False): assert [c for c in range(6) if not net.train(training)(x)[:, c].any()] == weak


@pytest.mark.parametrize('order,c', [(nn.BatchNorm1d, nn.Conv1d), (nn.BatchNorm2d, nn.ConvTranspose2d),
    (nn.BatchNorm3d, nn.Conv3d)])
def test_dimensions(order, c): assert norms(nn.Sequential(c(2, 2, 1), order(2)), torch.randn(2, 2, *[4]*{
    nn.Conv1d: 1, nn.ConvTranspose2d: 2, nn.Conv3d: 3}[c])) == {'0': ['1']}


def test_flow_counts():
    "The flow of data counts, not the order in the code"
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn_b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.b, self.bn_a = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        def forward(self, x): return self.bn_b(self.b(x)) + self.bn_a(self.a(x))
    assert norms(Crossed()) == {'a': ['bn_a'], 'b': ['bn_b']}


def test_block_called_twice():
    "A block that runs twice has its batch norm fed by its own convolution alone, both times"
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert norms(nn.Sequential(block, nn.ReLU(), block)) == {'0.0': ['0.1']}


### Filters that are pruned give zeros

makers = dict(
    conv=lambda: nn.Conv2d(4, 6, 3), conv1d=lambda: nn.Conv1d(4, 6, 3), grouped=lambda: nn.Conv2d(4, 6, 3, groups=2),
    depthwise=lambda: nn.Conv2d(6, 6, 3, groups=6), up=lambda: nn.ConvTranspose2d(4, 6, 3),
    grouped_up=lambda: nn.ConvTranspose2d(4, 6, 3, groups=2))
followers = dict(
    nothing=lambda bn: [], bn=lambda bn: [bn], relu_bn=lambda bn: [nn.ReLU(), bn], bn_relu=lambda bn: [bn, nn.ReLU()],
    gelu_drop_bn=lambda bn: [nn.GELU(), nn.Dropout(), bn])
weak = [1, 2, 5]


@pytest.mark.parametrize('after', followers.values(), ids=followers)
@pytest.mark.parametrize('make', makers.values(), ids=makers)
def test_pruned_channel_is_zero(make, after):
    "The channel of a pruned filter is zero, whatever its bias and batch norm had learned; other channels are not"
    m = make()
    bn = (nn.BatchNorm1d if isinstance(m, nn.Conv1d) else nn.BatchNorm2d)(6)
    net = nn.Sequential(m, *after(bn)).eval()
    for t in (m.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var): t.data.uniform_(.5, 2)
    with torch.no_grad():
        for c in range(6): channel(m, c).fill_(.01 if c in weak else 1.)  # the weak half is pruned
    Sparsifier(net, 'filter').prune(.5)
    out = net(torch.rand(2, m.in_channels, *[8]*(m.weight.dim()-2))).flatten(2)
    assert [c for c in range(6) if not out[:, c].any()] == weak
    assert [c for c in range(6) if not channel(m, c).any()] == weak


def test_pruned_channel_stays_zero():
    "The channel is zero again when `apply` or `prune` follows a training step that changed bias and batch norm"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    sp = Sparsifier(net, 'filter')
    sp.prune(.5)
    pruned = [c for c in range(4) if not net[0].weight[c].any()]
    for again in (sp.apply, lambda: sp.prune(.5)):
        for p in net.parameters(): p.data.add_(1.)
        again()
        out = net.eval()(torch.randn(2, 3, 8, 8))
        assert len(pruned) == 2 and [c for c in range(4) if not out[:, c].any()] == pruned


@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'shared_kernel'])
def test_only_filters_zero_bias_and_batchnorm(granularity):
    "Bias and batch norm are zeroed only with granularity `filter`, not if all parts of a filter happen to be pruned"
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    before = [p.clone() for p in (net[0].bias, net[1].weight, net[1].bias)]
    Sparsifier(net, granularity).prune(.5)
    assert all(torch.equal(*o) for o in zip(before, (net[0].bias, net[1].weight, net[1].bias)))


class Keeping(nn.Module):
    "Stores an activation, counts its calls, has a buffer that counts them too, and draws random numbers"
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.calls = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 0
        self.register_buffer('seen', torch.zeros(()))

    def forward(self, x):
        self.h = self.conv(x)
        self.calls += 1
        self.seen += 1
        random.random(), np.random.rand(), torch.rand(3)
        return self.bn(F.dropout(self.h, .5))


class TestForwardPass:
    "The forward pass that is observed"

    @pytest.mark.parametrize('training', [True, False])
    def test_changes_nothing(self, training):
        net, x = nn.Sequential(Keeping()).train(training), torch.randn(4, 3, 8, 8)
        state, seeds = bits(net), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        inside, params = [dict(vars(m)) for m in net.modules()], [id(p) for p in net.parameters()]
        assert norms(net, x) == {'0.conv': ['0.bn']}
        assert_same(net.state_dict(), state)
        assert [vars(m) for m in net.modules()] == inside and [id(p) for p in net.parameters()] == params
        assert torch.equal(torch.get_rng_state(), seeds[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == seeds[1:]

    def test_first_pass_only(self):
        "It is observed once, and no hook is left"
        net = Keeping()
        sp = Sparsifier(net, 'filter')
        net(torch.randn(4, 3, 8, 8))
        assert net.calls == 1 and [t.name for t in sp.filter_tensors['conv']] == ['conv.bias', 'bn.weight', 'bn.bias']
        assert not net._forward_pre_hooks and not net._forward_hooks

    def test_pruned_before_the_first_pass(self):
        "Filters that were pruned before are silent from the first pass on"
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        net[1].bias.data.fill_(1.)
        Sparsifier(net, 'filter').prune(.5)
        assert sum(not c.any() for c in net(torch.randn(2, 3, 8, 8)).movedim(1, 0)) == 2

    def test_sparsifier_is_not_kept(self):
        "After its first pass, the model does not keep the sparsifier alive"
        net = tiny_net()
        sparsifier = weakref.ref(Sparsifier(net))
        net(torch.randn(2, 4, 6, 6))
        gc.collect()
        assert sparsifier() is None

    @pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, clone):
        "A copy of the model before its first pass runs, and does not copy the sparsifier"
        net = tiny_net()
        sp = Sparsifier(net)
        other = clone(net)
        assert b'onecycle_prune' not in pickle.dumps(net) and b'onecycle_prune' not in pickle.dumps(other)
        assert_same(other.eval()(torch.ones(2, 4, 6, 6)), net.eval()(torch.ones(2, 4, 6, 6)))
        assert sp.layers

    def test_whole_batch(self):
        "A model that takes only whole batches"
        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            def forward(self, x): return self.bn(self.conv(x.view(8, 3, 8, 8)))
        assert norms(Whole(), torch.randn(8, 3, 8, 8)) == {'conv': ['bn']}

    def test_inputs_of_any_kind(self):
        "Several inputs, inputs by name, in a dict"
        class Many(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            def forward(self, x, *, scale): return dict(y=self.bn(self.conv(x['image']))*scale)
        net = Many()
        sp = Sparsifier(net, 'filter')
        net(dict(image=torch.randn(4, 3, 8, 8)), scale=2.)
        assert len(sp.filter_tensors['conv']) == 3

    def test_cannot_be_run(self):
        "If the extra pass fails, the training goes on with a warning"
        class Once(nn.Module):
            calls = []
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            def forward(self, x):
                self.calls.append(1)
                if len(self.calls) < 3: raise RuntimeError('not yet')
                return self.bn(self.conv(x))
        net = Once()
        sp = Sparsifier(net, 'filter')
        with pytest.warns(UserWarning, match=r'could not be observed \(RuntimeError: not yet\)'):
            net(torch.randn(4, 3, 8, 8))
        assert sp.prune(.5) == .5

    @pytest.mark.parametrize('wrap', [nn.DataParallel, lambda m: torch.compile(m, backend='eager')])
    def test_wrapped(self, wrap):
        net = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        sp = Sparsifier(net, 'filter')
        net(torch.randn(4, 3, 8, 8))
        assert [t.name for t in sp.filter_tensors['0']] == ['0.bias', '1.weight', '1.bias']

    def test_autocast(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        sp = Sparsifier(net, 'filter')
        with torch.autocast('cpu', torch.bfloat16): net(torch.randn(4, 3, 8, 8))
        assert len(sp.filter_tensors['0']) == 3

    def test_same_training(self, new_learner, monkeypatch):
        "The training has the same bits as without the observation"
        def run(observe):
            learn = new_learner()
            if not observe: monkeypatch.setattr(Sparsifier, 'observe', lambda *args: None)
            learn.fit(2, 1e-2, cbs=SparsifyCallback(.5))
            assert total_zeros(learn.model) == round(.5*total_weights)
            return [p.detach().clone() for p in learn.model.parameters()]
        assert_same(run(True), run(False))


class StdConv2d(nn.Conv2d):
    "As timm's, through a batch norm of the weight"
    def forward(self, x):
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Orthogonal(nn.Conv2d):
    "Newton-Schulz steps, each of which takes a tensor three times"
    def forward(self, x):
        w = self.weight.flatten(1)
        for _ in range(20): w = 1.5*w - .5*w @ w.t() @ w
        return F.conv2d(x, w.view_as(self.weight))


class MeanFree(nn.Conv2d):
    def forward(self, x): return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class MeanFreeLinear(nn.Linear):
    def forward(self, x): return x @ (self.weight - self.weight.mean()).t()


class Softmaxed(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight.softmax(-1))


class Plain(nn.Conv2d):
    "A layer with a forward of its own"
    def forward(self, x): return self.f(x)


passing = dict(
    same=lambda s, x: F.conv2d(x, s.weight), scaled=lambda s, x: F.conv2d(x, s.weight*s.weight.abs().mean()),
    padded=lambda s, x: F.conv2d(x, F.pad(s.weight, (1, 1, 1, 1))),
    cast=lambda s, x: F.conv2d(x.double(), s.weight.double()),
    dropped=lambda s, x: F.conv2d(x, F.dropout(s.weight, .3)), flipped=lambda s, x: F.conv2d(x, s.weight.flip(-1)),
    normed=lambda s, x: F.conv2d(x, F.normalize(s.weight.flatten(1)).view_as(s.weight)),
    signed=lambda s, x: F.conv2d(x, s.weight.sign()*s.weight.abs().mean()),
    detached=lambda s, x: F.conv2d(x, s.weight.data),
    penalty=lambda s, x: F.conv2d(x, s.weight) + (s.weight - s.weight.mean()).std()*x.mean())


class TestComputedWeights:
    "Weights that are not used as they are"

    @pytest.mark.parametrize('make,x', [(lambda: StdConv2d(3, 4, 3), torch.randn(2, 3, 8, 8)),
        (lambda: StdConv2d(3, 4, 3).to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8)),
        (lambda: Orthogonal(3, 8, 3), torch.randn(2, 3, 8, 8)),
        (lambda: MeanFree(3, 4, 3), torch.randn(2, 3, 8, 8)), (lambda: MeanFreeLinear(8, 4), torch.randn(2, 8)),
        (lambda: Softmaxed(8, 4), torch.randn(2, 8))])
    def test_refused(self, make, x):
        "The first pass raises an error that names all such layers and leaves them out, and no weight has changed"
        net = nn.Sequential(make(), nn.Identity())
        sp = Sparsifier(net)
        before = bits(net)
        with pytest.raises(ValueError, match=f'effect: 0. Leave them out: .*{type(net[0]).__name__}'): net(x)
        assert_same(bits(net), before)
        assert sp.layers

    def test_names_all(self, new_learner):
        "A network with several of them, in a fit; the expression in the error leaves them out"
        def net():
            return nn.Sequential(nn.Conv2d(4, 8, 3), MeanFree(8, 8, 3), StdConv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1),
                                 nn.Flatten(), nn.Linear(8, 4))
        learn = new_learner(net())
        with pytest.raises(ValueError, match='effect: 1, 2. Leave') as e: learn.fit(1, 1e-2, cbs=SparsifyCallback(.9))
        expression = str(e.value).rpartition('Leave them out: layers=')[2]
        learn = new_learner(net())
        learn.fit(1, 1e-2, cbs=SparsifyCallback(.9, layers=eval(expression)))
        assert [int((learn.model[i].weight == 0).sum()) > 0 for i in (0, 1, 2, 5)] == [True, False, False, True]

    @pytest.mark.parametrize('f', passing.values(), ids=passing)
    def test_passes(self, f):
        "Layers that scale, pad, cast, drop or permute their weights, in which zeros stay zeros"
        net = Plain(3, 4, 3)
        Plain.f = f
        calls = record_calls(net, (torch.randn(2, 3, 8, 8),))
        assert computed_weights(calls, {'': net.weight}) == []

    def test_constant_input(self):
        "A layer whose input does not depend on the data, as for relative positions"
        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(3, 4), nn.Conv2d(1, 4, 1), nn.Linear(3, 4)
                self.register_buffer('table', torch.randn(5, 3))
                self.learned = nn.Parameter(torch.randn(5, 3))
            def forward(self, x):
                return x + self.a(self.table) + self.b(torch.ones(1, 4, 4)).mean() + self.c(self.learned)
        net = Positions()
        calls = record_calls(net, (torch.randn(2, 5, 4),))
        assert computed_weights(calls, {n: m.weight for n, m in net.named_children()}) == []

    def test_not_called(self):
        "A layer that was not called is not judged"
        net = nn.ModuleDict(dict(used=nn.Linear(3, 3), unused=MeanFreeLinear(3, 3)))
        net.forward = lambda x: net['used'](x)
        calls = record_calls(net, (torch.randn(2, 3),))
        assert computed_weights(calls, {n: m.weight for n, m in net.items()}) == []

    def test_ordinary_networks(self):
        nets = [(tiny_net(), torch.randn(2, 4, 6, 6)), (nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(2, 5, 3)),
                (nn.TransformerEncoderLayer(8, 2, 16), torch.randn(2, 5, 8))]
        for net, x in nets:
            calls = record_calls(net, (x,))
            assert computed_weights(calls, {n: p for n, p in net.named_parameters() if p.ndim > 1}) == []
