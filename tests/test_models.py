"Networks that people train, for a few batches: each ends exactly as sparse as asked, and loads into one that was never pruned."
import pandas as pd, pytest, torch
from fastai.basics import Callback, DataLoader, DataLoaders, Learner
from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.all import unet_learner
from onecycle_prune.all import *
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torchvision.models import ConvNeXt, VisionTransformer, mobilenet_v2, resnet18
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.vgg import cfgs, make_layers

from conftest import assert_same, bits, hush, tiny_data, tiny_net

area = 'Models'
contexts = pytest.mark.parametrize('context', ['local', 'global'])
gen = torch.Generator().manual_seed(0)
images, tokens, classes = torch.randn(12, 3, 32, 32, generator=gen), torch.randint(20, (12, 5), generator=gen), torch.randint(2, (12,), generator=gen)


### What is held

def weights(net):
    "The weights of convolutions and linear layers, attention's projections too: each once, by where it is found first"
    res = {}
    for n, m in net.named_modules():
        if isinstance(m, conv+linear): res.setdefault(id(m.weight), (n, m.weight))
        if isinstance(m, nn.MultiheadAttention): res.setdefault(id(m.in_proj_weight), (f'{n}.in_proj', m.in_proj_weight))
    return dict(res.values())


class Others(Callback):
    "From the optimizer's step to the end of the batch, when pruning takes place, nothing but those weights changes"
    order = SparsifyCallback.order - 1
    def others(self):
        pruned = {w.data_ptr() for w in weights(self.model).values()}
        return {k: v.clone() for k, v in self.model.state_dict().items() if v.data_ptr() not in pruned}
    def after_step(self): self.before = self.others()
    def after_batch(self):
        if self.training: assert_same(self.others(), self.before)


def prune(learn, context='local'):
    "Train an epoch, in which parameters stay where they are"
    def place(): return [(id(p), p.data_ptr(), p.stride()) for p in learn.model.parameters()]
    before = place()
    hush(learn).fit(1, 1e-3, cbs=[SparsifyCallback(.9, context=context), Others()])
    assert place() == before
    return learn


def learner(net, x=images, y=classes, valid=4):
    "Three batches of four to train on; noise, as nothing has to be learned"
    items = [*zip(x, y)]
    return hush(Learner(DataLoaders(DataLoader(items, bs=4), DataLoader(items[:valid], bs=4)), net, nn.CrossEntropyLoss()))


def assert_pruned(net, fresh, *xs, context='local'):
    "Zeros are exact, and a `fresh` network gives the same for `xs` once it has this one's `state_dict`"
    zeros = {n: (int((w == 0).sum()), w.numel()) for n, w in weights(net).items()}
    if context == 'local': assert zeros == {n: (min(round(.9*k), k-1), k) for n, (_, k) in zeros.items()}
    else:
        pruned, total = map(sum, zip(*zeros.values()))
        assert pruned == round(.9*total) and all(z < k for z, k in zeros.values())
    fresh.load_state_dict(net.state_dict(), strict=True)
    with torch.no_grad(): assert_same(fresh.eval()(*xs), net.eval()(*xs))


### Networks

def vgg11_bn():
    "As in torchvision, an eighth as wide"
    features = make_layers([c if c == 'M' else c//8 for c in cfgs['A']], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 8, 2, bidirectional=True, batch_first=True), nn.Linear(16, 2)
    def forward(self, x): return self.head(self.lstm(self.embed(x))[0][:, -1])


class Twice(nn.Module):
    "One convolution in two places of the forward"
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)
    def forward(self, x): return self.head(self.conv(self.conv(self.stem(x)).relu()).relu().mean((2, 3)))


class Tied(nn.Module):
    "Two linear layers of one weight, and an output that is the embedding"
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.second.weight, self.out.weight = self.first.weight, self.embed.weight
    def forward(self, x): return self.out(self.second(self.first(self.embed(x)).tanh())).mean(1)


imaging = dict(
    resnet18=lambda: resnet18(num_classes=2),
    vgg11_bn=vgg11_bn,
    mobilenet_v2=lambda: mobilenet_v2(width_mult=.25, num_classes=2),
    convnext=lambda: ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=2),
    vit=lambda: VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=2),
    twice=Twice)


@contexts
@pytest.mark.parametrize('make', imaging.values(), ids=imaging)
def test_images(make, context):
    "ResNet, VGG, MobileNet with its depthwise convolutions, ConvNeXt, a vision transformer, a module that is used twice"
    net = prune(learner(make()), context).model
    assert_pruned(net, make(), images, context=context)


@pytest.mark.parametrize('make', [imaging[n] for n in ('resnet18', 'mobilenet_v2', 'convnext')], ids=['resnet18', 'mobilenet_v2', 'convnext'])
def test_channels_last(make):
    "Convolutional networks in channels-last layout"
    last = dict(memory_format=torch.channels_last)
    net = prune(learner(make().to(**last))).model
    assert any(p.dim() == 4 and not p.is_contiguous() for p in net.parameters())
    assert_pruned(net, make().to(**last), images.to(**last))


def test_attention():
    "The packed projection of queries, keys and values is a layer as any other"
    net = prune(learner(imaging['vit']())).model
    assert [int((m.in_proj_weight == 0).sum()) for m in net.modules() if isinstance(m, nn.MultiheadAttention)] == [round(.9*96*32)]*2


@contexts
def test_unet(context):
    "A U-Net of fastai's"
    def make(): return unet_learner(dls, resnet18, n_out=2, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss())
    items = [*zip(images[:8], (images[:8, 0] > 0).long())]
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items[:4], bs=4))
    net = prune(make(), context).model
    assert_pruned(net, make().model, images[:4], context=context)


@contexts
def test_tabular(context):
    "A tabular learner: its embeddings stay, its linear layers are pruned"
    df = pd.DataFrame(dict(a=tokens[:, 0], b=tokens[:, 1], c=images[:, 0, 0, 0], d=images[:, 0, 0, 1], y=classes)).loc[[*range(12)]*2]
    dls = TabularDataLoaders.from_df(df.reset_index(drop=True), procs=[Categorify, Normalize], cat_names=['a', 'b'], cont_names=['c', 'd'],
        y_names='y', y_block=CategoryBlock(), valid_idx=[*range(4)], bs=4)
    def make(): return tabular_learner(dls, layers=[16, 8])
    net = prune(make(), context).model
    assert_pruned(net, make().model, *dls.valid.one_batch()[:2], context=context)
    assert all(e.weight.all() for e in net.embeds)


def test_lstm():
    "A linear head is pruned; the recurrent weights are not"
    net = prune(learner(Recurrent(), tokens)).model
    assert_pruned(net, Recurrent(), tokens)
    assert [*weights(net)] == ['head'] and all(p.all() for p in [*net.lstm.parameters(), net.embed.weight])


@contexts
def test_tied(context):
    "A weight in two places is counted once, and both see its zeros"
    learn = prune(learner(Tied(), tokens), context)
    net = learn.model
    assert net.second.weight is net.first.weight and net.out.weight is net.embed.weight
    assert_pruned(net, Tied(), tokens, context=context)
    assert [*weights(net)] == ['first', 'out']
    counts = [round(.9*64), round(.9*160)] if context == 'local' else [round(.9*224)]
    assert learn.recorder.sparsities[-1] == sum(counts) / 224
    assert (net.embed.weight == 0).sum() + (net.second.weight == 0).sum() == sum(counts)


### What is refused, or left out

norms = dict(weight_norm=parametrizations.weight_norm, spectral_norm=parametrizations.spectral_norm, old_weight_norm=weight_norm,
    old_spectral_norm=spectral_norm)
norms = pytest.mark.parametrize('norm', norms.values(), ids=norms)
old_form = pytest.mark.filterwarnings('ignore::FutureWarning')  # torch's own


@norms
@old_form
def test_computed_weights(new_learner, norm):
    "Weights that are computed from others: refused by name, and nothing has changed by then, not the state of a spectral norm either"
    net = tiny_net()
    norm(net[3])
    learn, before = new_learner(net), bits(net)
    with pytest.raises(ValueError, match=r"Layer '3' \(.*Conv2d\) computes its weight.*remove its parametrization"): learn.fit(1, cbs=SparsifyCallback(.9))
    assert_same(bits(net), before)


@pytest.mark.parametrize('norm', [parametrizations.weight_norm, parametrizations.spectral_norm], ids=['weight_norm', 'spectral_norm'])
def test_computed_attention(norm):
    "The packed projection of attention too"
    net = nn.TransformerEncoderLayer(8, 2, 16)
    norm(net.self_attn, 'in_proj_weight')
    with pytest.raises(ValueError, match=r"Layer 'self_attn\.in_proj'.*computes its weight.*remove its parametrization"): Sparsifier(net)


@pytest.mark.parametrize('norm', [parametrizations.weight_norm, parametrizations.spectral_norm], ids=['weight_norm', 'spectral_norm'])
def test_no_longer_computed(new_learner, norm):
    "What the refusal of computed weights advises helps"
    net = tiny_net()
    norm(net[3])
    parametrize.remove_parametrizations(net[3], 'weight')
    prune(new_learner(net))
    assert_pruned(net, tiny_net(), tiny_data()[0])


@norms
@old_form
def test_computed_is_left_out(new_learner, norm):
    "Where others are pruned, a layer that is left out trains as it would have"
    def run(*cbs):
        net = tiny_net()
        norm(net[3])
        new_learner(net).fit(1, 1e-2, cbs=cbs)
        return bits(net)
    assert_same(run(SparsifyCallback(0., layers=['0', '8'])), run())


def lazy(): return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def test_lazy():
    "Lazy modules: refused with a hint before the first batch, and pruned after one"
    net = lazy()
    learn = learner(net)
    with pytest.raises(ValueError, match='no weights yet: 0, 4. Pass a batch through the model first'): learn.fit(1, cbs=SparsifyCallback(.9))
    assert nn.parameter.is_lazy(net[0].weight) and nn.parameter.is_lazy(net[4].weight)
    fresh = lazy()
    for o in net, fresh: o(images)
    assert_pruned(prune(learn).model, fresh, images)


### Compiled

@pytest.fixture
def compiled():
    "A function that trains a compiled network with `cbs`, and returns the network and what the compiler has counted"
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
    "torch.compile: pruning breaks no graph and compiles nothing again: the compiler has counted what it has without pruning"
    _, dense = compiled()
    net, pruned = compiled(SparsifyCallback(.9, **kwargs))
    assert pruned == dense and dense['stats']['unique_graphs'] and 'graph_break' not in dense
    assert any((w == 0).sum() for w in weights(net).values())


def test_compiled(compiled):
    "torch.compile: one graph, never compiled again, and the network inside can be had without the compiler"
    with torch._dynamo.config.patch(error_on_recompile=True): net, counts = compiled(SparsifyCallback(.9), fullgraph=True, valid=0)
    assert counts['stats']['unique_graphs'] == 1
    assert_pruned(net, Twice(), images, context='global')
