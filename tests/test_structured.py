"Structured pruning: channels of coupled layers are pruned together, exactly as many as asked, and can be removed"
import copy, random
from functools import partial

import numpy as np, pytest, torch, torchvision
from fastai.basics import Callback, set_seed
from fastai.callback.all import SchedLin
from fastai.tabular.model import TabularModel
from fastai.vision.all import DynamicUnet, create_body, create_head, resnet18
from hypothesis import assume, given, settings, strategies as st
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.criteria import Variety
from onecycle_prune.deploy.shrink import shrink
from onecycle_prune.experiments.networks import resnet18_cifar
from onecycle_prune.granularity import Granularity, Structured, get_granularity
from onecycle_prune.sparsifier import Sparsifier
from onecycle_prune.structured import find_coupled_layers
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from channel_networks import RandomNet, assert_equal_outputs, images, randomize
from helpers import Probe, assert_resumes, assert_same, bits
from networks import adam, momentum_sgd, tiny_images
from reference import expected_sparsities


class ResidualNet(nn.Module):
    "A stem whose channels a residual block writes too, a convolution of its own, and a linear layer"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.last, self.last_norm = nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8)
        self.hidden, self.out = nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.last_norm(self.last(self.first_norm(self.first(x)).relu()))).relu()
        return self.out(self.hidden(x.mean((2, 3))).relu())


#: {name of a set: all that belongs to it: weights, biases, norms}
parts = {
    'stem': ['stem', 'stem_norm', 'last', 'last_norm'], 'first': ['first', 'first_norm'], 'hidden': ['hidden']}
sizes = {'stem': 8, 'first': 12, 'hidden': 10}


def silent(net):
    "For each set, which channels are zero in all parameters that belong to them"
    def is_zero(name):
        tensors = [p.flatten(1) if p.ndim > 1 else p[:, None] for p in net.get_submodule(name).parameters()]
        return torch.cat(tensors, 1).eq(0).all(1)
    return {n: torch.stack([is_zero(o) for o in members]).all(0) for n, members in parts.items()}


def n_silent(net): return {n: int(o.sum()) for n, o in silent(net).items()}


def n_zero_filters(net):
    "As `silent`, but the channels of which any filter is zero"
    def zeros(name): return net.get_submodule(name).weight.flatten(1).eq(0).all(1)
    return {n: int(torch.stack([zeros(o) for o in members if 'norm' not in o]).any(0).sum())
            for n, members in parts.items()}


@pytest.fixture
def learner(new_learner):
    "A function that makes a learner of a `ResidualNet`"
    def _make(**kwargs): return new_learner(ResidualNet(), **kwargs)
    return _make


class TestTraining:
    "In a training"
    @pytest.mark.parametrize('context', ['local', 'global'])
    @pytest.mark.parametrize('criteria', ['large_final', 'movement', 'taylor', 'random', lambda m: m.weight.square()])
    def test_exact(self, learner, context, criteria):
        "After each batch, as many channels as the schedule asks for are zero in all that belongs to them"
        learn, probe, zeros = learner(), Probe(n_silent), Probe(n_zero_filters)
        learn.fit_one_cycle(3, 1e-2, cbs=[SparsifyCallback(.6, 'structured', context, criteria), probe, zeros])
        for counts, s in zip(probe.seen, expected_sparsities('one_cycle', .6), strict=True):
            if context == 'local': assert counts == {n: round(s*size) for n, size in sizes.items()}
            else: assert sum(counts.values()) == round(s*sum(sizes.values()))
        assert zeros.seen == probe.seen

    def test_stays_pruned(self, learner):
        "A pruned channel does not return"
        learn, probe = learner(), Probe(silent)
        learn.fit_one_cycle(3, 1e-2, cbs=[SparsifyCallback(.6, 'structured'), probe])
        for before, after in zip(probe.seen, probe.seen[1:]):
            assert all((before[n] <= after[n]).all() for n in parts)
        assert n_silent(learn.model) == {n: round(.6*size) for n, size in sizes.items()}

    def test_shrink(self, learner):
        "All pruned channels can be removed, and the outputs are the same"
        learn, x = learner(), tiny_images()
        learn.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback(.5, 'structured'))
        small = shrink(learn.model, x)
        assert [small.stem.out_channels, small.first.out_channels, small.hidden.out_features] == [4, 6, 5]
        assert_equal_outputs(learn.model, small, (x,))

    @pytest.mark.parametrize('context', ['local', 'global'])
    def test_one_channel_stays(self, learner, context):
        learn = learner()
        with pytest.warns(UserWarning, match='One group of each layer is kept'):
            learn.fit(1, 1e-2, cbs=SparsifyCallback(1, 'structured', context))
        assert n_silent(learn.model) == {n: size-1 for n, size in sizes.items()}

    @pytest.mark.parametrize('kwargs', [{}, dict(context='global'), dict(criteria='movement'),
        dict(granularity=Structured(3), context='global'),
        dict(criteria=Variety('movement'))], ids=str)
    @pytest.mark.parametrize('opt_func', [momentum_sgd, adam], ids=['sgd', 'adam'])
    def test_resume(self, learner, kwargs, opt_func):
        "From an ordinary checkpoint, bit for bit"
        kwargs = dict(sparsity=.7, granularity='structured') | kwargs
        assert_resumes(partial(learner, opt_func=opt_func), **kwargs)

    def test_same_training(self, learner):
        "With a sparsity of 0, weights, statistics, data and random numbers are those of a training without pruning"
        ends = []
        for cbs in ([], [SparsifyCallback(0, 'structured', bn_batches=0)]):
            set_seed(1)
            learn = learner()
            seen = Probe(lambda _: (random.random(), np.random.rand(), torch.rand(1)))
            learn.fit_one_cycle(2, 1e-2, cbs=[*cbs, seen])
            ends.append((bits(learn.model), seen.seen))
        assert_same(*ends)

    def test_model_is_untouched(self, learner):
        "No hook and no other attribute, mode or key"
        def anatomy(net): return [(n, type(m), sorted(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks),
                                   m.training) for n, m in net.named_modules()]
        learn, probe = learner(), Probe(anatomy)
        before, keys = anatomy(learn.model), list(learn.model.state_dict())
        learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5, 'structured'), probe])
        assert all(o == before for o in probe.seen) and list(learn.model.state_dict()) == keys
        assert n_silent(learn.model) == {'stem': 4, 'first': 6, 'hidden': 5}

    def test_frozen(self, learner):
        "A set of which a layer is frozen is pruned when all of it is trained"
        learn = learner()
        learn.model.last.requires_grad_(False)
        with pytest.warns(UserWarning, match='Frozen layers are not pruned: last'):
            learn.fit(1, 1e-2, cbs=SparsifyCallback(.5, 'structured'))
        assert n_silent(learn.model) == {'stem': 0, 'first': 6, 'hidden': 5}
        learn.model.last.requires_grad_(True)
        learn.fit(1, 1e-2, cbs=SparsifyCallback(.5, 'structured'))
        assert n_silent(learn.model) == {'stem': 4, 'first': 6, 'hidden': 5}

    def test_unfrozen_meanwhile(self, learner):
        "Layers that a callback unfreezes"
        learn = learner()
        learn.model.last.requires_grad_(False)
        unfreeze = Callback(before_epoch=lambda self: self.model.last.requires_grad_(self.epoch > 0))
        with pytest.warns(UserWarning, match='Frozen layers'):
            learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5, 'structured'), unfreeze])
        assert n_silent(learn.model) == {'stem': 4, 'first': 6, 'hidden': 5}

    @pytest.mark.parametrize('sparsity,expected', [
        ({'stem': .5, nn.Linear: .2}, {'stem': 4, 'first': 0, 'hidden': 2}),
        ({'last': .5}, {'stem': 4, 'first': 0, 'hidden': 0}), # a name of any of the layers
        ({nn.Conv2d: .25, 'first': .5}, {'stem': 2, 'first': 6, 'hidden': 0})], ids=str)
    def test_dict(self, learner, sparsity, expected):
        "A key is the name of any layer of a set, or a class"
        learn = learner()
        learn.fit(1, 1e-2, cbs=SparsifyCallback(sparsity, 'structured'))
        assert n_silent(learn.model) == expected

    @pytest.mark.parametrize('context', ['local', 'global'])
    @pytest.mark.parametrize('round_to', [2, 3, 4, 5, 7, 30])
    def test_round_to(self, learner, round_to, context):
        "A multiple of a number of channels stays, or all; blocks of channels are counted exactly"
        learn, probe, masks = learner(), Probe(n_silent), Probe(silent)
        cb = SparsifyCallback(.6, Structured(round_to), context)
        learn.fit_one_cycle(3, 1e-2, cbs=[cb, probe, masks])
        blocks = {n: -(-size//round_to) for n, size in sizes.items()}
        for counts, s in zip(probe.seen, expected_sparsities('one_cycle', .6), strict=True):
            kept = {n: sizes[n] - counts[n] for n in sizes}
            assert all(kept[n] == sizes[n] or kept[n] % round_to == 0 and kept[n] for n in sizes)
            n_pruned = {n: blocks[n] - -(-kept[n]//round_to) for n in sizes}
            if context == 'local': assert n_pruned == {n: min(round(s*o), o-1) for n, o in blocks.items()}
            else: assert sum(n_pruned.values()) == min(round(s*sum(blocks.values())), sum(blocks.values()) - 3)
        for before, after in zip(masks.seen, masks.seen[1:]):
            assert all((before[n] <= after[n]).all() for n in parts)

    def test_schedule_that_falls(self, learner):
        "Channels return"
        learn, probe = learner(), Probe(n_silent)
        learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5, 'structured', schedule=SchedLin(1, .5)), probe])
        assert [o['first'] for o in probe.seen] == [round(12*.5*(1-(i+1)/20)) for i in range(10)]

    def test_validation_alone(self, learner):
        "`validate` and `lr_find` prune nothing"
        learn = learner(cbs=SparsifyCallback(.5, 'structured'))
        before = bits(learn.model)
        learn.validate()
        learn.lr_find(num_it=20, show_plot=False)
        assert_same(bits(learn.model), before)

    def test_average(self, learner):
        "An average of the weights gets the masks, norms included"
        learn = learner()
        learn.fit(1, 1e-2, cbs=SparsifyCallback(.5, 'structured'))
        sparsifier = Sparsifier(learn.model, 'structured', inputs=tiny_images())
        other = ResidualNet()
        sparsifier.apply(other)
        assert_same(silent(other), silent(learn.model))
        assert n_silent(other) == {'stem': 4, 'first': 6, 'hidden': 5}

    def test_interrupted(self, learner):
        "A training that an error ends leaves exactly the channels of the masks zero, and the learner as it was"
        learn, cb = learner(), SparsifyCallback(.6, 'structured')
        def fail(self):
            if self.epoch == 1: raise RuntimeError('stop')
        with pytest.raises(RuntimeError, match='stop'): learn.fit(3, 1e-2, cbs=[cb, Callback(after_backward=fail)])
        assert n_silent(learn.model) == {n: int(m.sum()) for n, m in cb.sparsifier.coupled.masks.items()}
        assert '_with_events' not in vars(learn) and sum(n_silent(learn.model).values())

    def test_fails_before_the_first_batch(self, learner):
        "A model that cannot be followed: the error says why, and nothing has changed"
        learn, cb = learner(), SparsifyCallback(.6, 'structured', layers='out')
        before = bits(learn.model)
        with pytest.raises(ValueError, match="out: output of the model.*'filter'"): learn.fit(1, cbs=cb)
        assert_same(bits(learn.model), before)
        assert '_with_events' not in vars(learn) and cb not in learn.cbs


class TestFinding:
    "Which channels are coupled"
    def test_sets(self):
        net = ResidualNet()
        sp = Sparsifier(net, 'structured', inputs=tiny_images())
        assert sp.coupled.sets == {'stem': ['stem', 'last'], 'first': ['first'], 'hidden': ['hidden']}
        assert sp.coupled.not_pruned == {'out': 'output of the model'}

    def test_resnet(self):
        "The residual stages of a ResNet-18, by hand"
        net = torchvision.models.resnet18(num_classes=4)
        found = Sparsifier(net, 'structured', inputs=torch.randn(2, 3, 32, 32)).coupled.sets
        stages = {'conv1': ['conv1', 'layer1.0.conv2', 'layer1.1.conv2']} | {
            f'layer{i}.0.conv2': [f'layer{i}.{o}' for o in ('0.conv2', '0.downsample.0', '1.conv2')] for i in (2, 3, 4)}
        alone = {f'layer{i}.{j}.conv1': [f'layer{i}.{j}.conv1'] for i in range(1, 5) for j in (0, 1)}
        assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in (stages | alone).items()}

    def test_layers(self):
        "A set is pruned if all layers that write it are chosen; a warning names the others"
        net = ResidualNet()
        with pytest.warns(UserWarning, match=r'stem \(last.weight writes its channels too'):
            sp = Sparsifier(net, 'structured', layers=['stem', 'first'], inputs=tiny_images())
        assert list(sp.coupled.sets) == ['first'] == list(sp.layers)

    @pytest.mark.parametrize('round_to', [0, -1, 1.5, True, '8'])
    def test_wrong_number(self, round_to):
        with pytest.raises(ValueError, match='round_to is a number of channels'): Structured(round_to)

    def test_instance(self):
        "`Granularity('structured')` is the same"
        assert Sparsifier(ResidualNet(), Granularity('structured'), inputs=tiny_images()).coupled
        assert get_granularity(Granularity('head')).couples

    def test_no_inputs(self):
        with pytest.raises(ValueError, match='give `inputs`'): Sparsifier(ResidualNet(), 'structured')

    def test_wrong_inputs(self):
        net = ResidualNet()
        before = bits(net)
        with pytest.raises(ValueError, match='cannot be followed'):
            Sparsifier(net, 'structured', inputs=torch.randn(2, 9))
        assert_same(bits(net), before)

    @pytest.mark.parametrize('norm', [nn.BatchNorm2d(6, affine=False), nn.InstanceNorm2d(6), FrozenBatchNorm2d(6)],
        ids=lambda o: type(o).__name__)
    def test_norms_without_parameters(self, norm):
        "Their buffers are zeroed, if the channel is not silent without"
        net = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 2, 3))
        for b in norm.buffers():
            if b.is_floating_point(): b.uniform_(.5, 1)
        x = torch.randn(4, 3, 8, 8)
        sp = Sparsifier(net, 'structured', inputs=x)
        sp.prune(.5)
        small = shrink(net, x)
        assert small[0].out_channels == 3
        assert_equal_outputs(net, small, (x,))

    @pytest.mark.parametrize('between', [nn.Sigmoid(), nn.Softplus(), nn.LocalResponseNorm(3), nn.GroupNorm(2, 6)],
        ids=lambda o: type(o).__name__)
    def test_not_silent(self, between):
        "Channels that would not be zero without their filters, or that a norm mixes, are not pruned"
        net = nn.Sequential(nn.Conv2d(3, 6, 3), between, nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
        sp = Sparsifier(net, 'structured', inputs=torch.randn(4, 3, 8, 8))
        assert list(sp.coupled.sets) == ['2'] and sp.coupled.not_pruned['0']

    def test_computed_weight(self):
        net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 6)), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2))
        with pytest.warns(UserWarning, match='3 .output of the model'):
            sp = Sparsifier(net, 'structured', layers=['2', '3'], inputs=torch.randn(4, 3))
        assert list(sp.coupled.sets) == ['2']

    def test_moved(self):
        "A model in another precision has new buffers"
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 2, 3))
        x = torch.randn(4, 3, 8, 8)
        sp = Sparsifier(net, 'structured', inputs=x)
        net.double()
        sp.prune(.5)
        assert shrink(net, x.double())[0].out_channels == 3

    def test_state(self):
        "The state has masks of the layers; the channels follow"
        one, two = [Sparsifier(ResidualNet(), 'structured', inputs=tiny_images()) for _ in range(2)]
        one.prune(.5)
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        assert_same(two.coupled.pruned, one.coupled.pruned)
        assert two.prune(.5) == one.prune(.5) == 15/30


def expected_scores(net, sets, criterion):
    "The mean over the layers of a set, plainly: scores of rows relative to the mean of the layer"
    scores = {}
    for name, members in sets.items():
        rows = [criterion(net.get_submodule(o)).flatten(1).mean(1) for o in members]
        scores[name] = torch.stack([r/r.abs().mean() for r in rows]).mean(0)
    return scores


class TestSelection:
    "The channels with the lowest scores"
    @pytest.mark.parametrize('context', ['local', 'global'])
    @pytest.mark.parametrize('criterion', [lambda m: m.weight.abs(), lambda m: -m.weight.abs(), lambda m: m.weight])
    def test_lowest(self, criterion, context):
        net = ResidualNet().double()
        sp = Sparsifier(net, 'structured', context, criterion, inputs=tiny_images().double())
        scores = expected_scores(net, sp.coupled.sets, criterion)
        pools = [[n] for n in scores] if context == 'local' else [list(scores)]
        sp.prune(.5)
        for pool in pools:
            values = torch.cat([scores[n] for n in pool])
            found = torch.cat([sp.coupled.masks[n] for n in pool])
            assert found.sum() == round(.5*len(values)) and values[found].max() < values[~found].min()

    @pytest.mark.parametrize('context', ['local', 'global'])
    @pytest.mark.parametrize('criteria', ['large_final', 'small_final', 'movement', 'taylor', 'magnitude_increase'])
    @pytest.mark.parametrize('channels_last', [False, True])
    def test_compiled(self, criteria, context, channels_last):
        "The compiled kernels find the same channels as PyTorch, step by step"
        pytest.importorskip('numba')
        def train(is_compiled):
            net, x = resnet18_cifar(4, width=8), torch.randn(2, 3, 16, 16)
            if channels_last: net = net.to(memory_format=torch.channels_last)
            sp = Sparsifier(net, 'structured', context, criteria, inputs=x)
            if not is_compiled: sp._for_kernels = lambda names: {}
            found = []
            for s in (.1, .1, .3, .6):
                for p in net.parameters():
                    p.grad = torch.randn_like(p)
                    p.data += .1*torch.randn_like(p)
                sp.prune(s)
                found.append((sp.coupled.pruned.clone(), bits(net)))
            return found
        ends = []
        for is_compiled in (True, False):
            torch.manual_seed(0)
            ends.append(train(is_compiled))
        assert_same(*ends)

    @pytest.mark.gpu
    @pytest.mark.parametrize('round_to', [1, 4])
    @pytest.mark.parametrize('context', ['local', 'global'])
    def test_gpu(self, context, round_to):
        "On a GPU the same channels are pruned"
        found = []
        for device in ('cpu', 'cuda'):
            torch.manual_seed(0)
            net, x = torchvision.models.resnet18(num_classes=4).double().to(device), torch.randn(2, 3, 32, 32)
            sp = Sparsifier(net, Structured(round_to), context, inputs=x.double().to(device))
            for s in (.2, .5): sp.prune(s)
            found.append((sp.coupled.pruned.cpu(), {k: v.cpu() for k, v in bits(net).items()}))
        assert_same(*found)

    def test_groups_of_a_convolution(self):
        "A channel of a grouped convolution has a filter in each group"
        net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 12, 3, groups=2), nn.Conv2d(12, 12, 3, groups=12),
            nn.Conv2d(12, 6, 3, groups=3), nn.Conv2d(6, 2, 1))
        x = torch.randn(2, 4, 8, 8)
        sp = Sparsifier(net, 'structured', inputs=x)
        sp.prune(.5)
        small = shrink(net, x)
        assert all(m.out_channels < n.out_channels for m, n in zip(small[:-1], net[:-1]))
        assert_equal_outputs(net, small, (x,))


class TestTimm:
    "Networks of timm"
    @pytest.mark.slow
    @pytest.mark.parametrize('name', ['mobilenetv3_small_100', 'ghostnet_100', 'regnetx_002', 'convnext_atto',
        'vit_tiny_patch16_224', 'hrnet_w18_small', 'levit_128s', 'selecsls42'])
    def test_timm(self, name):
        timm = pytest.importorskip('timm')
        net = timm.create_model(name, num_classes=10, drop_rate=0)
        for m in net.modules():
            if isinstance(m, nn.Linear) and not m.weight.any(): nn.init.normal_(m.weight)
        size = net.default_cfg['input_size'][-1] if name[0] in 'vl' else 64
        check(net, images(2, size))


class TestOnnx:
    def test_same_outputs(self, tmp_path):
        "ONNX Runtime computes with the small network what PyTorch computes with the pruned one"
        onnxruntime = pytest.importorskip('onnxruntime')
        pytest.importorskip('onnxscript')
        net, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(2, 3, 64, 64)
        Sparsifier(net, 'structured', inputs=x).prune(.5)
        small, files = shrink(net, x), [tmp_path/'dense.onnx', tmp_path/'small.onnx']
        for network, file in zip((net, small), files):
            torch.onnx.export(network, (x,), file, input_names=['x'], external_data=False, verbose=False)
        found, = onnxruntime.InferenceSession(files[1]).run(None, {'x': x.numpy()})
        with torch.no_grad(): torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-4)
        assert files[1].stat().st_size < .3*files[0].stat().st_size


def check(net, *xs, sparsity=.4, training=True):
    "Prune a network, and shrink it: all pruned channels are removed, and the outputs are the same"
    net = randomize(net)
    sp = Sparsifier(net, 'structured', inputs=xs)
    sp.prune(sparsity)
    assert sum(int(m.sum()) for m in sp.coupled.masks.values()) == sum(
        min(round(sparsity*len(m)), len(m)-1) for m in sp.coupled.masks.values())
    small = shrink(net, xs)
    assert_equal_outputs(net, small, xs, training)
    for n, pruned in sp.pruned.items():
        before, after = net.get_submodule(n), small.get_submodule(n)
        def width(m): return getattr(m, 'out_channels', getattr(m, 'out_features', None))
        assert width(before) - width(after) == int(pruned.sum())
    return sp, small


names = ['resnet18', 'resnet50', 'resnext50_32x4d', 'densenet121', 'mobilenet_v2', 'mobilenet_v3_small',
    'efficientnet_b0', 'convnext_tiny', 'regnet_y_400mf', 'shufflenet_v2_x0_5', 'squeezenet1_1', 'mnasnet0_5']


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


class TestNetworks:
    "Networks of torchvision, fastai, and random ones"
    @pytest.mark.parametrize('name', names)
    def test_torchvision(self, name): check(getattr(torchvision.models, name)(num_classes=10), images())

    def test_flatten(self):
        "A channel of an image becomes many features"
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(8*30*30, 6), nn.ReLU(), nn.Linear(6, 2))
        _, small = check(net, images())
        assert small[4].in_features == 5*30*30

    def test_googlenet(self): check(torchvision.models.googlenet(num_classes=10, init_weights=False), images())

    def test_vision_transformer(self):
        "The hidden units of its perceptrons"
        net = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=5)
        nn.init.normal_(net.heads.head.weight)
        sp, _ = check(net, images())
        assert list(sp.coupled.sets) == [f'encoder.layers.encoder_layer_{i}.mlp.0' for i in (0, 1)]

    def test_unet(self): check(DynamicUnet(create_body(resnet18(), pretrained=False), 3, (64, 64)), images(2, 64))

    def test_tabular(self):
        net = TabularModel([(10, 8), (5, 6)], 3, 2, layers=[50, 20])
        check(net, torch.randint(0, 5, (7, 2)), torch.randn(7, 3, dtype=torch.double))

    def test_vision_learner(self):
        check(nn.Sequential(create_body(resnet18(), pretrained=False), create_head(512, 5)), images(2, 64))

    @settings(deadline=None, max_examples=40)
    @given(st.data())
    def test_random_network(self, data):
        "Every channel that is not an input, and not tied to one, is pruned with all that it is tied to"
        torch.manual_seed(0)
        net = RandomNet(data.draw)
        assume(len(net.layers))
        net, group = randomize(net), net.together()
        x = images(3, 6)
        free = {g for written in net.written for g in (group[o] for o in written)} - {0}
        if not free:
            with pytest.raises(ValueError, match='No channel can be pruned'):
                find_coupled_layers(net, {}, x)
            return
        sp = Sparsifier(net, 'structured', inputs=x)
        assert sp.coupled.n == len(free)
        sp.prune(.5)
        pruned = set()
        for layer, written in zip(net.layers, net.written):
            for o, weight in zip(written, layer[0].weight.flatten(1)):
                if not weight.any(): pruned.add(group[o])
        for layer, written in zip(net.layers, net.written):
            for i, o in enumerate(written):
                rows = layer[0].weight[i], layer[0].bias[i], layer[1].weight[i], layer[1].bias[i]
                assert all((not r.any()) == (group[o] in pruned) for r in rows)
        assert len(pruned) == int(sp.coupled.pruned.sum())
        assert_equal_outputs(net, shrink(net, x), (x,))
