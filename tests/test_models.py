"Well-known networks, trained for a few batches: each ends exactly at its sparsity, and loads into a dense one."
import pandas as pd, pytest, torch
from fastai.basics import Callback, DataLoader, DataLoaders, Learner
from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.all import unet_learner
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.granularity import conv, linear
from onecycle_prune.sparsifier import Sparsifier
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torchvision.models import ConvNeXt, VisionTransformer, mobilenet_v2, resnet18
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.vgg import cfgs, make_layers

from helpers import assert_same, bits
from networks import silence, tiny_data, tiny_net
from reference import param_layout

area = 'Models'
contexts = pytest.mark.parametrize('context', ['local', 'global'])
gen = torch.Generator().manual_seed(0)
images = torch.randn(12, 3, 32, 32, generator=gen)
tokens = torch.randint(20, (12, 5), generator=gen)
classes = torch.randint(2, (12,), generator=gen)


### What is asserted

def weights(net):
    "The weights that are pruned by default, each once, under its first name"
    res = {}
    embedded = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    for n, m in net.named_modules():
        if isinstance(m, conv+linear) and id(m.weight) not in embedded: res.setdefault(id(m.weight), (n, m.weight))
        if isinstance(m, nn.LSTM): res |= {id(p): (f'{n}.{k}', p) for k, p in m.named_parameters() if p.ndim == 2}
        if isinstance(m, nn.MultiheadAttention):
            res.setdefault(id(m.in_proj_weight), (f'{n}.in_proj', m.in_proj_weight))
    return dict(res.values())


class WatchOthers(Callback):
    "Assert that from the optimizer's step to the end of the batch nothing but those weights changes"
    order = SparsifyCallback.order - 1
    def others(self):
        pruned = {w.data_ptr() for w in weights(self.model).values()}
        return {k: v.clone() for k, v in self.model.state_dict().items() if v.data_ptr() not in pruned}
    def after_step(self): self.before = self.others()
    def after_batch(self):
        if self.training: assert_same(self.others(), self.before)


def prune(learn, context='local'):
    "Train for an epoch, in which parameters stay in place"
    before = param_layout(learn.model)
    silence(learn).fit(1, 1e-3, cbs=[SparsifyCallback(.9, context=context), WatchOthers()])
    assert param_layout(learn.model) == before
    return learn


def learner(net, x=images, y=classes, valid=4):
    "A learner with three training batches of four items of noise"
    items = [*zip(x, y)]
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items[:valid], bs=4))
    return silence(Learner(dls, net, nn.CrossEntropyLoss()))


def assert_pruned(net, fresh, *xs, context='local'):
    "Counts are exact, and a `fresh` network with the `state_dict` of `net` has the same outputs for `xs`"
    zeros = {n: (int((w == 0).sum()), w.numel()) for n, w in weights(net).items()}
    if context == 'local': assert zeros == {n: (min(round(.9*k), k-1), k) for n, (_, k) in zeros.items()}
    else:
        n_pruned, total = map(sum, zip(*zeros.values()))
        assert n_pruned == round(.9*total) and all(z < k for z, k in zeros.values())
    fresh.load_state_dict(net.state_dict(), strict=True)
    with torch.no_grad(): assert_same(fresh.eval()(*xs), net.eval()(*xs))


### Networks

def vgg11_bn():
    "torchvision's, with an eighth of the channels"
    features = make_layers([c if c == 'M' else c//8 for c in cfgs['A']], batch_norm=True)
    head = nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 2)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(16, 2)
        self.lstm = nn.LSTM(8, 8, 2, bidirectional=True, batch_first=True)
    def forward(self, x): return self.head(self.lstm(self.embed(x))[0][:, -1])


class Twice(nn.Module):
    "One convolution that the forward pass uses twice"
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)
    def forward(self, x): return self.head(self.conv(self.conv(self.stem(x)).relu()).relu().mean((2, 3)))


class Tied(nn.Module):
    "Two linear layers with one weight, and an output layer with the weight of the embedding"
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 20)
        self.second.weight, self.out.weight = self.first.weight, self.embed.weight
    def forward(self, x): return self.out(self.second(self.first(self.embed(x)).tanh())).mean(1)


imaging = dict(
    resnet18=lambda: resnet18(num_classes=2),
    vgg11_bn=vgg11_bn,
    mobilenet_v2=lambda: mobilenet_v2(width_mult=.25, num_classes=2),
    convnext=lambda: ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=2),
    vit=lambda: VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64,
        num_classes=2),
    twice=Twice)


@contexts
@pytest.mark.parametrize('make', imaging.values(), ids=imaging)
def test_images(make, context):
    "ResNet, VGG, MobileNet with depthwise convolutions, ConvNeXt, a vision transformer, a module that is used twice"
    net = prune(learner(make()), context).model
    assert_pruned(net, make(), images, context=context)


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'convnext'])
def test_channels_last(name):
    "Convolutional networks in channels-last layout"
    make, last = imaging[name], dict(memory_format=torch.channels_last)
    net = prune(learner(make().to(**last))).model
    assert any(p.dim() == 4 and not p.is_contiguous() for p in net.parameters())
    assert_pruned(net, make().to(**last), images.to(**last))


def test_attention():
    "The packed projection of queries, keys and values is pruned like any layer"
    net = prune(learner(imaging['vit']())).model
    projections = [m.in_proj_weight for m in net.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [int((w == 0).sum()) for w in projections] == [round(.9*96*32)]*2


@pytest.mark.slow
@contexts
def test_unet(context):
    "fastai's U-Net"
    def make():
        return unet_learner(dls, resnet18, n_out=2, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss())
    items = [*zip(images[:8], (images[:8, 0] > 0).long())]
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items[:4], bs=4))
    net = prune(make(), context).model
    assert_pruned(net, make().model, images[:4], context=context)


@contexts
def test_tabular(context):
    "A tabular learner: its linear layers are pruned, its embeddings are not"
    df = pd.DataFrame(dict(a=tokens[:, 0], b=tokens[:, 1], c=images[:, 0, 0, 0], d=images[:, 0, 0, 1], y=classes))
    dls = TabularDataLoaders.from_df(pd.concat([df, df], ignore_index=True), procs=[Categorify, Normalize],
        cat_names=['a', 'b'], cont_names=['c', 'd'], y_names='y', y_block=CategoryBlock(), valid_idx=[*range(4)], bs=4)
    def make(): return tabular_learner(dls, layers=[16, 8])
    net = prune(make(), context).model
    assert_pruned(net, make().model, *dls.valid.one_batch()[:2], context=context)
    assert all(e.weight.all() for e in net.embeds)


@contexts
def test_lstm(context):
    "An LSTM of two layers and two directions: its input and recurrent weights are pruned, its embedding is not"
    net = prune(learner(Recurrent(), tokens), context).model
    assert_pruned(net, Recurrent(), tokens, context=context)
    assert len(weights(net)) == 9 and net.embed.weight.all()


@contexts
@pytest.mark.filterwarnings('ignore:Layers that share')
def test_tied(context):
    "A weight that two layers share is counted once; one that an embedding shares is not pruned"
    learn = prune(learner(Tied(), tokens), context)
    net = learn.model
    assert net.second.weight is net.first.weight and net.out.weight is net.embed.weight
    assert_pruned(net, Tied(), tokens, context=context)
    assert [*weights(net)] == ['first'] and net.embed.weight.all()
    assert learn.recorder.sparsities[-1] == round(.9*64) / 64


### What raises an error, or is left out

new_norms = dict(weight_norm=parametrizations.weight_norm, spectral_norm=parametrizations.spectral_norm)
all_norms = new_norms | dict(old_weight_norm=weight_norm, old_spectral_norm=spectral_norm)
with_new_norms = pytest.mark.parametrize('norm', new_norms.values(), ids=new_norms)
with_all_norms = pytest.mark.parametrize('norm', all_norms.values(), ids=all_norms)
no_old_norm_warning = pytest.mark.filterwarnings('ignore::FutureWarning')  # PyTorch's own


@with_all_norms
@no_old_norm_warning
def test_reparametrized(new_learner, norm):
    "Reparametrized weights raise an error that names the layer, before anything changes, even a spectral norm's state"
    net = tiny_net()
    norm(net[3])
    learn, before = new_learner(net), bits(net)
    with pytest.raises(ValueError, match=r"Layer '3' \(.*Conv2d\) computes its weight.*Remove its parametrization"):
        learn.fit(1, cbs=SparsifyCallback(.9))
    assert_same(bits(net), before)


@with_new_norms
def test_reparametrized_attention(norm):
    "A reparametrized projection of attention raises the same error"
    net = nn.TransformerEncoderLayer(8, 2, 16)
    norm(net.self_attn, 'in_proj_weight')
    message = r"Layer 'self_attn\.in_proj'.*computes its weight.*Remove its parametrization"
    with pytest.raises(ValueError, match=message):
        Sparsifier(net)


@with_new_norms
def test_parametrization_removed(new_learner, norm):
    "Once the parametrization is removed, as the error advises, the layer is pruned"
    net = tiny_net()
    norm(net[3])
    parametrize.remove_parametrizations(net[3], 'weight')
    prune(new_learner(net))
    assert_pruned(net, tiny_net(), tiny_data()[0])


@with_all_norms
@no_old_norm_warning
def test_reparametrized_left_out(new_learner, norm):
    "A reparametrized layer that is left out trains as without pruning"
    def run(*cbs):
        net = tiny_net()
        norm(net[3])
        new_learner(net).fit(1, 1e-2, cbs=cbs)
        return bits(net)
    assert_same(run(SparsifyCallback(0., layers=['0', '8'])), run())


def lazy(): return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def test_lazy():
    "Lazy modules: an error with a hint before the first batch, pruned after one"
    net = lazy()
    learn = learner(net)
    with pytest.raises(ValueError, match='no weights yet: 0, 4. Pass a batch through the model first'):
        learn.fit(1, cbs=SparsifyCallback(.9))
    assert nn.parameter.is_lazy(net[0].weight) and nn.parameter.is_lazy(net[4].weight)
    fresh = lazy()
    for o in net, fresh: o(images)
    assert_pruned(prune(learn).model, fresh, images)


### Compiled

@pytest.fixture
def compiled():
    "A function that trains a compiled network with `cbs`, and returns the network and the compiler's counters"
    def _train(*cbs, valid=4, **kwargs):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        net = Twice()
        learn = learner(torch.compile(net, backend='eager', **kwargs), valid=valid)
        learn.fit(2, 1e-3, cbs=cbs)
        return net, {k: dict(v) for k, v in counters.items() if v}
    yield _train
    torch._dynamo.reset()


@pytest.mark.parametrize('kwargs', [{}, dict(context='global'), dict(granularity='filter')], ids=str)
def test_compiled_counts(compiled, kwargs):
    "torch.compile: pruning breaks no graph and recompiles nothing, by the compiler's counters"
    _, dense = compiled()
    net, pruned = compiled(SparsifyCallback(.9, **kwargs))
    assert pruned == dense and dense['stats']['unique_graphs'] and 'graph_break' not in dense
    assert any((w == 0).sum() for w in weights(net).values())


def test_compiled(compiled):
    "torch.compile: one graph, never recompiled, and the network inside works without the compiler"
    with torch._dynamo.config.patch(error_on_recompile=True):
        net, counts = compiled(SparsifyCallback(.9), fullgraph=True, valid=0)
    assert counts['stats']['unique_graphs'] == 1
    assert_pruned(net, Twice(), images, context='global')
