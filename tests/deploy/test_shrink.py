"A shrunk network computes the same, and has all that it needs"
import copy, io, json, math, pickle

import pytest, torch, torchvision
from fastai.tabular.model import TabularModel
from fastai.vision.all import DynamicUnet, create_body, create_head, resnet18
from hypothesis import assume, given, settings, strategies as st
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.channels import Channels
from onecycle_prune.deploy.attention import NarrowAttention
from onecycle_prune.deploy.shrink import shrink, shrink_like, shrink_report
from torch import nn
from torch.nn.utils import prune as torch_prune
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2

from channel_networks import RandomNet, assert_equal_outputs, images, randomize
from helpers import assert_same, bits
from networks import tiny_images, tiny_net


@torch.no_grad()
def silence_some(net, xs, share=.4):
    "Zero random channels in all layers that they belong to; return how many parameters remain without them"
    removed, tensors = {}, dict(net.named_parameters())
    for o in Channels(net, xs).coupled():
        places = o.writers | o.readers
        # The first channel of a layer stays, so that no layer loses all.
        is_first = any(indices[0] == 0 for indices in places.values())
        if o.reason != 'in use' or is_first or torch.rand(()) > share: continue
        if not any(name in tensors for name, _ in o.writers): continue # columns of a table in a buffer
        for (name, axis), indices in places.items():
            if name not in tensors: continue
            removed.setdefault(name, {}).setdefault(axis, []).extend(indices)
            if (name, axis) in o.writers: tensors[name].index_fill_(axis, torch.tensor(indices), 0)
    assert removed
    left = {n: list(p.shape) for n, p in tensors.items()}
    for name, axes in removed.items():
        for axis, indices in axes.items(): left[name][axis] -= len(indices)
    return sum(map(math.prod, left.values()))


def n_parameters(net): return sum(p.numel() for p in net.parameters())


def check(net, *xs, training=True):
    "Shrink a network in which random channels are silent"
    net = randomize(net)
    n_left = silence_some(net, xs)
    before = bits(net)
    small = shrink(net, xs)
    assert_same(bits(net), before)
    assert n_parameters(small) == n_left < n_parameters(net)
    assert_equal_outputs(net, small, xs, training)
    assert classes(small) == classes(net)
    return small


def classes(net):
    "The name and the class of each module; attention that has lost heads counts as PyTorch's"
    def _class(m): return nn.MultiheadAttention if type(m) is NarrowAttention else type(m)
    return [(n, _class(m)) for n, m in net.named_modules()]


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


names = ['resnet18', 'resnet50', 'vgg11_bn', 'densenet121', 'mobilenet_v2', 'mobilenet_v3_small', 'efficientnet_b0',
    'convnext_tiny', 'regnet_y_400mf', 'shufflenet_v2_x0_5', 'squeezenet1_1', 'mnasnet0_5']
slow = {'vgg11_bn'}


class TestNetworks:
    "Networks of torchvision and fastai"
    @pytest.mark.parametrize('name', [pytest.param(o, marks=pytest.mark.slow) if o in slow else o for o in names])
    def test_torchvision(self, name): check(getattr(torchvision.models, name)(num_classes=10), images())

    def test_one_input(self):
        "A layer with one input channel is not depthwise"
        check(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 1, 3),
            nn.Conv2d(1, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), images()[:, :1])

    def test_googlenet(self):
        "In training mode two further classifiers read channels"
        net = torchvision.models.googlenet(num_classes=10, init_weights=False)
        small = check(net, images())
        assert small.aux1.conv.conv.in_channels < net.aux1.conv.conv.in_channels

    @pytest.mark.slow
    def test_inception(self):
        "Its images are too small for its training mode"
        net = torchvision.models.inception_v3(num_classes=10, init_weights=False)
        with pytest.warns(UserWarning, match='In training mode the model fails'):
            check(net, images(2, 75), training=False)

    def test_vision_transformer(self):
        "The hidden units of its perceptrons, and heads of attention; its width and the residuals stay"
        net = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=5)
        small = check(net, images())
        blocks = small.encoder.layers
        assert all(o.mlp[0].out_features < 128 and o.self_attention.embed_dim == 64 for o in blocks)
        assert any(o.self_attention.num_heads < 4 for o in blocks)

    @pytest.mark.parametrize('block', [SwinTransformerBlock, SwinTransformerBlockV2])
    def test_swin(self, block):
        net = torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5, block=block)
        check(net, images())

    def test_segmentation(self):
        "The outputs are a dictionary"
        net = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=4)
        check(net, images())

    def test_video(self):
        net = torchvision.models.video.r2plus1d_18(num_classes=4)
        check(net, torch.randn(2, 3, 2, 8, 8, dtype=torch.double))

    @pytest.mark.parametrize('batch_first', [True, False])
    def test_transformer_encoder(self, batch_first):
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0, batch_first=batch_first)
        check(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(3, 7, 32, dtype=torch.double))

    def test_unet(self):
        net = DynamicUnet(create_body(resnet18(), pretrained=False), 3, (64, 64))
        check(net, images(2, 64))

    def test_tabular(self):
        "Embeddings lose features, and no rows"
        net = TabularModel([(10, 8), (5, 6)], 3, 2, layers=[50, 20])
        small = check(net, torch.randint(0, 5, (7, 2)), torch.randn(7, 3, dtype=torch.double))
        assert [o.num_embeddings for o in small.embeds] == [10, 5]

    def test_vision_learner(self):
        "Average and maximum of each channel are features of the head"
        net = nn.Sequential(create_body(resnet18(), pretrained=False), create_head(512, 5))
        small = check(net, images(2, 64))
        assert small[1][2].num_features == 2*small[0][7][1].bn2.num_features


class TestRandom:
    "Additions, products, concatenations, groups, shuffles, and layers that are used again"
    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_random_network(self, data):
        torch.manual_seed(0)
        net = RandomNet(data.draw)
        assume(len(net.layers))
        net = randomize(net)
        dead, group = net.silence(data.draw), net.together()
        x = images(3, 6)
        small = shrink(net, x)
        def left(ids): return sum(group[o] not in dead for o in ids)
        for layer, written, read in zip(small.layers, net.written, net.read):
            assert (layer[0].out_channels, layer[0].in_channels) == (left(written), left(read))
            assert layer[1].num_features == left(written)
        assert small.last.in_features == sum(map(left, net.maps[1:]))
        assert_equal_outputs(net, small, (x,))


def silent_net():
    "A small network in which the first half of each hidden layer is silent"
    net = randomize(tiny_net()).float()
    with torch.no_grad():
        for i in (0, 3):
            for t in (*net[i].parameters(), *net[i+1].parameters()): t[:len(t)//2] = 0
    return net


class TestUse:
    "What can be done with a small network"
    def test_trains_on(self, new_learner):
        small = shrink(silent_net(), tiny_images())
        learn = new_learner(small)
        before = bits(small)
        learn.fit(1)
        assert not torch.equal(before['0.weight'], small[0].weight)
        assert small[0].weight.shape == (4, 4, 3, 3)

    def test_learner(self, new_learner):
        learn = new_learner(silent_net())
        small = shrink(learn, learn.dls.one_batch()[0])
        assert small[0].out_channels == 4 and learn.model[0].out_channels == 8

    @pytest.mark.parametrize('context', ['local', 'global'])
    def test_after_pruning(self, new_learner, context):
        "Pruned filters, with their norms, are removed"
        learn = new_learner()
        learn.fit(2, cbs=SparsifyCallback(.5, 'filter', context, layers=nn.Conv2d))
        net, x = learn.model, tiny_images()
        small = shrink(learn, x)
        n_left = [int(net[i].weight.flatten(1).any(1).sum()) for i in (0, 3)]
        assert [small[i].out_channels for i in (0, 3)] == n_left and sum(n_left) == 12
        torch.testing.assert_close(small.eval()(x), net.eval()(x))

    def test_copies(self):
        "Deep copies, pickle and torch.save"
        x, small = tiny_images(), shrink(silent_net(), tiny_images())
        file = io.BytesIO()
        torch.save(small, file)
        file.seek(0)
        for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), small(x))

    def test_mode_and_gradients(self):
        "The mode of each module and which parameters are trained stay"
        net = silent_net().train()
        net[1].eval()
        net[3].requires_grad_(False)
        small = shrink(net, tiny_images())
        assert [o.training for o in small.modules()] == [o.training for o in net.modules()]
        assert [o.requires_grad for o in small.parameters()] == [o.requires_grad for o in net.parameters()]

    def test_leaves_random_state(self):
        net, x = silent_net(), tiny_images()
        state = torch.get_rng_state()
        shrink(net, x)
        assert torch.equal(torch.get_rng_state(), state)

    def test_again(self):
        "Nothing is left to remove"
        small = shrink(silent_net(), tiny_images())
        again = shrink(small, tiny_images())
        assert_same(bits(again), bits(small))

    def test_nothing_to_remove(self):
        net = tiny_net()
        assert_same(bits(shrink(net, tiny_images())), bits(net))

    def test_one_channel_stays(self):
        net = randomize(tiny_net()).float()
        with torch.no_grad():
            for t in (*net[3].parameters(), *net[4].parameters()): t.zero_()
        x = tiny_images()
        small = shrink(net, x)
        # Without a reader, the first layer keeps one channel too.
        assert [small[i].out_channels for i in (0, 3)] == [1, 1]
        torch.testing.assert_close(small(x), net(x))

    def test_report(self):
        net, x = silent_net(), tiny_images()
        small = shrink(net, x)
        table = shrink_report(net, small, x)
        assert table.index.tolist() == ['0', '3', '8']
        assert table.kept.tolist() == [4, 8, 4]
        assert table['why not less'].tolist() == ['in use', 'in use', 'output of the model']
        assert 'why not less' not in shrink_report(net, small)


class TestRecord:
    "A fresh network takes the shapes and the weights of the small one"
    def test_state_dict(self, tmp_path):
        net, x = silent_net(), tiny_images()
        small = shrink(net, x, record=tmp_path/'small.json')
        for record in (tmp_path/'small.json', json.loads((tmp_path/'small.json').read_text())):
            fresh = shrink_like(tiny_net(), record)
            fresh.load_state_dict(small.state_dict())
            assert torch.equal(fresh.eval()(x), small(x))
            assert repr(fresh) == repr(small)

    def test_cuts_the_same(self, tmp_path):
        "The record is of all rounds"
        net = randomize(tiny_net())
        with torch.no_grad(): net[3].weight[:, :3] = 0
        shrink(net, tiny_images().double(), record=tmp_path/'small.json')
        assert_same(bits(shrink_like(net, tmp_path/'small.json')), bits(shrink(net, tiny_images().double())))

    @pytest.mark.parametrize('change,message', [
        (lambda o: o['0.weight'].update(shape=[9, 4, 3, 3]), r'0\.weight has the shape \[8, 4, 3, 3\]'),
        (lambda o: o.update(other=o['0.weight']), 'other is not in the model'),
        (lambda o: o.update({'0.bias': [1]}), 'is no entry of a record'),
        (lambda o: o['0.weight']['kept'].update({'7': [0]}), "has no axis '7'"),
        (lambda o: o['0.weight']['kept'].update({'0': [0, 8]}), 'wrong indices along axis 0'),
        (lambda o: o['0.weight']['kept'].update({'0': []}), 'wrong indices along axis 0'),
        (lambda o: o['0.weight']['kept'].update({'0': [3, 1]}), 'wrong indices along axis 0')])
    def test_wrong_record(self, tmp_path, change, message):
        shrink(silent_net(), tiny_images(), record=tmp_path/'small.json')
        record = json.loads((tmp_path/'small.json').read_text())
        change(record)
        net = tiny_net()
        before = bits(net)
        with pytest.raises(ValueError, match=message): shrink_like(net, record)
        assert_same(bits(net), before)

    def test_no_record(self, tmp_path):
        (tmp_path/'other.json').write_text('[1]')
        (tmp_path/'broken.json').write_text('{')
        for name in ('other', 'broken'):
            with pytest.raises(ValueError, match='is no record'): shrink_like(tiny_net(), tmp_path/f'{name}.json')


class Hard(nn.Module):
    "Two layers, with something between them"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def between(self, x): return x

    def forward(self, x): return self.b(self.between(self.a(x).relu()))


def silent_hard(between, training=True):
    net = randomize(type('Net', (Hard,), dict(between=between))())
    with torch.no_grad(): net.a.weight[[1, 2, 6]], net.a.bias[[1, 2, 6]] = 0, 0
    small = shrink(net, images())
    assert_equal_outputs(net, small, (images(),), training)
    return small.a.out_channels


class TestForwards:
    "Code between two layers. Of 8 channels, 1, 2 and 6 are silent"
    @pytest.mark.parametrize('between,n_left', {
        'nothing': (lambda self, x: x, 5),
        'number in the code': (lambda self, x: x.view(-1, 8, 1024).view(-1, 8, 32, 32), 8),
        'number of the shape': (lambda self, x: x.view(len(x), x.shape[1], -1).view(x.shape), 5),
        'constant': (lambda self, x: x*torch.arange(1., 9).view(-1, 1, 1), 8),
        'part': (lambda self, x: torch.cat([x[:, 4:], x[:, :4]], 1), 8),
        'halves': (lambda self, x: torch.cat(x.chunk(2, 1)[::-1], 1), 6), # 2 and 6
        'reversed': (lambda self, x: x.flip(1), 5),
        'sigmoid': (lambda self, x: x.sigmoid(), 8),
        'softmax': (lambda self, x: x.softmax(1), 8),
        'softmax over pixels': (lambda self, x: x.flatten(2).softmax(2).view(x.shape), 8),
        'mean of channels': (lambda self, x: x - x.mean(1, keepdim=True), 8),
        'mean of pixels': (lambda self, x: x - x.mean((2, 3), keepdim=True), 5),
        'parts by Python': (lambda self, x: torch.stack([part for image in x for part in image]).view(x.shape), 8),
        'sort': (lambda self, x: x.sort(1)[0], 8),
        'filled': (lambda self, x: x*filled(x), 8),
        'resized': (lambda self, x: nn.functional.interpolate(x, scale_factor=2, mode='bilinear'), 5),
        'padded': (lambda self, x: nn.functional.pad(x, (1, 1, 1, 1), 'reflect'), 5),
        'padded with ones': (lambda self, x: nn.functional.pad(x, (1, 1), value=1.), 8)}.values())
    def test_between(self, between, n_left): assert silent_hard(between) == n_left

    def test_masked_weight(self):
        "A weight that is computed from others stays"
        net = tiny_net().eval()
        torch_prune.ln_structured(net[0], 'weight', .5, 2, 0)
        assert shrink(net, tiny_images())[0].out_channels == 8

    def test_norm_that_shifts(self):
        "A silent filter is not silent after a norm with a bias or with other statistics"
        for name, n_left in (('bias', 8), ('running_mean', 8), ('none', 5)):
            net = randomize(tiny_net())
            with torch.no_grad():
                net[0].weight[:3], net[0].bias[:3] = 0, 0
                for t in (net[1].bias, net[1].running_mean): t[:3] = 0
                if name != 'none': getattr(net[1], name)[:3] = .5
            assert shrink(net, tiny_images().double())[0].out_channels == n_left

    def test_transposed(self):
        net = randomize(nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2),
            nn.ReLU(), nn.Conv2d(6, 2, 1)))
        n_left = silence_some(net, (images(),))
        small = shrink(net, images())
        assert n_parameters(small) == n_left
        assert_equal_outputs(net, small, (images(),))

    def test_pixel_shuffle(self):
        net = randomize(nn.Sequential(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)))
        with torch.no_grad(): net[0].weight[4:9], net[0].bias[4:9] = 0, 0
        small = shrink(net, images())
        assert (small[0].out_channels, small[3].in_channels) == (12, 3)
        assert_equal_outputs(net, small, (images(),))

    def test_tied_embedding(self):
        "A linear layer with the weight of an embedding: features are removed from both, words from none"
        net = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 7, bias=False))
        net[3].weight = net[0].weight
        with torch.no_grad():
            for t in (net[0].weight.T, net[1].weight, net[1].bias): t[:2] = 0
        x = torch.arange(7)[None]
        small = shrink(net, x)
        assert small[3].weight is small[0].weight and small[0].weight.shape == (7, 4)
        assert (small[0].embedding_dim, small[3].in_features, small[3].out_features) == (4, 4, 7)
        torch.testing.assert_close(small(x), net(x))

    def test_no_layers(self):
        assert isinstance(shrink(nn.ReLU(), torch.ones(2, 3)), nn.ReLU)

    def test_recurrent(self):
        "A recurrent layer stays, and layers after it shrink"
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.a, self.b = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 6), nn.Linear(6, 2)
            def forward(self, x): return self.b(self.a(self.rnn(x)[0]).relu())
        net = randomize(Net())
        with torch.no_grad(): net.a.weight[:2], net.a.bias[:2] = 0, 0
        x = torch.randn(2, 5, 3, dtype=torch.double)
        small = shrink(net, x)
        assert small.a.out_features == 4
        assert_equal_outputs(net, small, (x,))


def filled(x):
    t = torch.zeros(8, 1, 1, dtype=x.dtype)
    t[:4] = 1
    return t + 1


class TestErrors:
    "What an error says"
    def test_wrong_input(self):
        with pytest.raises(ValueError, match='it fails with these inputs'): shrink(tiny_net(), torch.ones(2, 3, 6, 6))

    def test_no_output(self):
        class Net(nn.Linear):
            def forward(self, x): super().forward(x)
        with pytest.raises(ValueError, match='returns no tensor'): shrink(Net(2, 3), torch.ones(2, 2))

    def test_cannot_shrink(self):
        "The code has a number of channels where no call shows it"
        def between(self, x):
            if x.shape[1] != 8: raise RuntimeError('8 channels, please')
            return x
        with pytest.raises(ValueError, match='cannot be shrunk, since the smaller network fails: 8 channels'):
            silent_hard(between)
