"fastai's learners, and layers of many kinds: each trains, and the whole model is as sparse as the report says."
from copy import deepcopy

import pandas as pd, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, L
from fastai.tabular.all import Categorify, CategoryBlock, TabularDataLoaders, tabular_learner
from fastai.text.all import (
    AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner)
from fastai.vision.all import unet_learner
from fastai.vision.gan import GANLearner, basic_critic, basic_generator
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.deploy.costs import costs
from onecycle_prune.granularity import get_granularity
from onecycle_prune.layers import choose, coverage, prunable, warn_of_coverage
from onecycle_prune.report import sparsity_report
from onecycle_prune.sparsifier import Sparsifier
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torchvision.models import resnet18
from torchvision.ops import DeformConv2d

from helpers import assert_same
from networks import silence

area = 'Learners and kinds of layers'
gen = torch.Generator().manual_seed(0)
tokens = torch.randint(2, 20, (16, 6), generator=gen)
classes = tokens[:, 0] % 2
words = [f'w{i}' for i in range(20)]


def loaders(x, y):
    items = [*zip(x, y)]
    return DataLoaders(DataLoader(items, bs=4), DataLoader(items[:4], bs=4))


def n_zeros(tensors): return sum(int((t == 0).sum()) for t in tensors)


def assert_whole(model, names, share):
    "The parameters with these names have `share` zeros, and the report counts each parameter of the model once"
    params = dict(model.named_parameters())
    chosen = [params[n] for n in names]
    total = sum(p.numel() for p in chosen)
    assert n_zeros(chosen) == round(share*total)
    report = sparsity_report(model)
    whole = report.iloc[-1]
    n = sum(p.numel() for p in params.values())
    assert (whole.layer, whole.weights, whole.zeros) == ('model', n, n_zeros(params.values()))
    assert whole.sparsity == n_zeros(params.values()) / n
    return whole.sparsity


### Learners

small = dict(emb_sz=12, n_hid=16, n_layers=2)


def rnn_names(n):
    "The names of the parameters of `n` of AWD-LSTM's layers"
    return [f'{p}.{i}.{k}' for i in range(n) for p in ['rnns'] for k in ('weight_hh_l0_raw', 'module.weight_ih_l0')]


def text_classifier():
    dls = loaders(tokens, classes)
    dls.vocab, dls.c = L(words, ['a', 'b']), 2
    config = awd_lstm_clas_config | small
    return silence(text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, lin_ftrs=[8],
                                           loss_func=CrossEntropyLossFlat()))


def language_model():
    dls = loaders(tokens[:, :-1], tokens[:, 1:])
    dls.vocab = words
    config = awd_lstm_lm_config | small
    return silence(language_model_learner(dls, AWD_LSTM, config=config, pretrained=False))


def test_text_classifier():
    "A text classifier on an AWD-LSTM: its recurrent weights are pruned, in their raw form"
    learn = text_classifier()
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.8))
    names = [f'0.module.{n}' for n in rnn_names(2)]
    names += [n for n, p in learn.model[1].named_parameters(prefix='1') if p.ndim == 2]
    assert assert_whole(learn.model, names, .8) > .65
    for rnn in learn.model[0].module.rnns:
        rnn.eval()
        rnn(torch.zeros(1, 1, rnn.module.input_size))
        assert n_zeros([rnn.module.weight_hh_l0]) == n_zeros([rnn.weight_hh_l0_raw]) > 0
    assert coverage(learn, prunable(learn))[1].keys() == {'Embedding'}


def test_costs_of_a_text_classifier():
    "Zeros of weights that an AWD-LSTM copies in each forward pass are counted, also of a learner not trained yet"
    learn = text_classifier()
    assert learn.model.training
    sparse = text_classifier()
    Sparsifier(sparse, context='local').prune(.5)
    table = costs(dict(dense=learn, sparse=sparse), tokens, seconds=.01)
    assert learn.model.training
    assert table['without zeros']['dense'] == table['multiply-adds']['dense']
    assert table['without zeros']['sparse'] == table['multiply-adds']['sparse']//2


def test_budget_of_a_text_classifier():
    "A budget in multiply-adds takes in the weights that an AWD-LSTM copies"
    learn = text_classifier()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8, context='multiply_adds'))
    table = costs(dict(sparse=learn), tokens, seconds=.01)
    assert table['without zeros']['sparse']/table['multiply-adds']['sparse'] == pytest.approx(.2, abs=.005)


@pytest.mark.filterwarnings('error:.*share.*:UserWarning')
def test_language_model_by_name():
    "A language model whose head is asked for by name: the embedding shares its weight, and is pruned with it"
    learn = language_model()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8, layers=['0', '1.decoder']))
    assert learn.model[0].encoder.weight is learn.model[1].decoder.weight
    names = [f'0.{n}' for n in rnn_names(2)] + ['0.encoder.weight']
    assert assert_whole(learn.model, names, .8) > .7


def test_language_model():
    "A language model: its head shares a weight with the embedding, which is left out with a warning"
    learn = language_model()
    with pytest.warns(UserWarning, match=r'share their weight with an embedding are not pruned: 1\.decoder') as seen:
        learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    assert sum('embedding' in str(w.message) for w in seen) == 1
    assert_whole(learn.model, [f'0.{n}' for n in rnn_names(2)], .8)
    assert learn.model[0].encoder.weight[2:].all()


def tabular():
    df = pd.DataFrame(dict(a=tokens[:, 0], b=tokens[:, 1], c=tokens[:, 2].float(), y=classes))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['a', 'b'], cont_names=['c'], y_names='y',
        y_block=CategoryBlock(), valid_idx=[*range(4)], bs=4)
    return silence(tabular_learner(dls, layers=[16, 8]))


@pytest.mark.parametrize('layers,least', [(None, .3), ([nn.Embedding, nn.Linear], .75)], ids=['default', 'embeddings'])
def test_tabular(layers, least):
    "A tabular learner: its embeddings are pruned only if `layers` asks for them"
    learn = tabular()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.9, layers=layers))
    names = [n for n, p in learn.model.named_parameters() if p.ndim == 2 and (layers or 'embeds' not in n)]
    assert assert_whole(learn.model, names, .9) > least


def test_unet():
    "A U-Net learner"
    images = torch.randn(8, 3, 32, 32, generator=gen)
    dls = loaders(images, (images[:, 0] > 0).long())
    learn = silence(unet_learner(dls, resnet18, n_out=2, pretrained=False, normalize=False,
                                 loss_func=CrossEntropyLossFlat(axis=1)))
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.9))
    assert assert_whole(learn.model, [n for n, p in learn.model.named_parameters() if p.ndim > 1], .9) > .89


def gan(layers=None):
    images = torch.rand(16, 3, 16, 16, generator=gen)
    generator, critic = basic_generator(16, 3, in_sz=4, n_features=8), basic_critic(16, 3, n_features=8)
    learn = GANLearner.wgan(loaders(torch.randn(16, 4, generator=gen), images), generator, critic)
    silence(learn).fit(2, 1e-3, cbs=SparsifyCallback(.8, layers=layers))
    return learn.model


def test_gan():
    "A GAN learner, which frees the weights of its two networks in turn"
    net = gan()
    assert assert_whole(net, [n for n, p in net.named_parameters() if p.ndim > 1], .8) > .75


def test_gan_critic():
    "The critic of a GAN learner alone"
    net = gan('critic')
    assert_whole(net, [n for n, p in net.named_parameters() if p.ndim > 1 and n.startswith('critic')], .8)
    assert all(p.all() for n, p in net.named_parameters() if p.ndim > 1 and n.startswith('generator'))


### Kinds of layers

class First(nn.Module):
    "The first output of a recurrent layer"
    def __init__(self, m):
        super().__init__()
        self.rnn = m
    def forward(self, x):
        out = self.rnn(x)
        return out[0] if isinstance(out, tuple) else out


class Conv1D(nn.Module):
    "The transposed linear layer of GPT-2"
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))
    def forward(self, x): return x@self.weight + self.bias


class Up(_ConvTransposeNd):
    "A transposed convolution of a user's own"
    def __init__(self):
        super().__init__(4, 6, (3,), (1,), (0,), (1,), True, (0,), 2, True, 'zeros')
    def forward(self, x): return nn.functional.conv_transpose1d(x, self.weight, self.bias, groups=self.groups)


class Offsets(nn.Module):
    def __init__(self):
        super().__init__()
        self.deform = DeformConv2d(4, 6, 3, groups=2)
    def forward(self, x): return self.deform(x, torch.zeros(len(x), 18, 4, 4))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = nn.Bilinear(4, 4, 3)
    def forward(self, x): return self.pair(x, x.flip(0))


class Experts(nn.Module):
    "A mixture of experts, whose weights are in one parameter with three dimensions"
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 4, 8)), nn.Parameter(torch.randn(3, 8, 4))
    def forward(self, x): return torch.einsum('bi,eij,ejk->bk', x, self.w1, self.w2)


class CondConv(nn.Module):
    "A convolution whose kernel is a mixture, as in timm's CondConv2d: a row for each expert"
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6*4*9))
    def forward(self, x): return nn.functional.conv2d(x, self.weight.mean(0).view(6, 4, 3, 3))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
    def forward(self, x): return x@self.parts[0]@self.parts[1]


rows, steps = torch.randn(5, 4, generator=gen), torch.randn(3, 5, 4, generator=gen)
maps = torch.randn(2, 4, 6, 6, generator=gen)
kinds = dict(  # {name: (network, input, layers, names of the parameters that are pruned)}
    lstm=(First(nn.LSTM(4, 6, 2, bidirectional=True)), steps, None,
          [f'rnn.weight_{k}_l{i}{r}' for i in (0, 1) for k in ('ih', 'hh') for r in ('', '_reverse')]),
    lstm_projected=(First(nn.LSTM(4, 6, proj_size=3)), steps, None, [f'rnn.weight_{k}_l0' for k in ('ih', 'hh', 'hr')]),
    lstm_by_class=(nn.Sequential(nn.Linear(4, 4), First(nn.LSTM(4, 6))), steps, nn.LSTM,
                   ['1.rnn.weight_ih_l0', '1.rnn.weight_hh_l0']),
    lstm_by_function=(nn.Sequential(nn.Linear(4, 4), First(nn.LSTM(4, 6))), steps, lambda m: isinstance(m, nn.LSTM),
                      ['1.rnn.weight_ih_l0', '1.rnn.weight_hh_l0']),
    all_but_lstm=(nn.Sequential(nn.Linear(4, 4), First(nn.LSTM(4, 6))), steps, lambda m: not isinstance(m, nn.LSTM),
                  ['0.weight']),
    recurrent_only=(First(nn.GRU(4, 6)), steps, 'rnn.weight_hh_l0', ['rnn.weight_hh_l0']),
    gru=(First(nn.GRU(4, 6)), steps, None, ['rnn.weight_ih_l0', 'rnn.weight_hh_l0']),
    rnn=(First(nn.RNN(4, 6)), steps, 'rnn', ['rnn.weight_ih_l0', 'rnn.weight_hh_l0']),
    lstm_cell=(First(nn.LSTMCell(4, 6)), rows, None, ['rnn.weight_ih', 'rnn.weight_hh']),
    gru_cell=(First(nn.GRUCell(4, 6)), rows, nn.GRUCell, ['rnn.weight_ih', 'rnn.weight_hh']),
    bilinear=(Pair(), rows, None, ['pair.weight']),
    conv1d=(nn.Sequential(Conv1D(8, 4)), rows, None, ['0.weight']),
    conv1d_by_class=(nn.Sequential(Conv1D(8, 4), nn.Linear(8, 2)), rows, Conv1D, ['0.weight']),
    transposed=(Up(), rows.T[None], None, ['weight']),
    deform=(Offsets(), maps, None, ['deform.weight']),
    embedding=(nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 2)), tokens, nn.Embedding, ['0.weight']),
    embedding_by_name=(nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 2)), tokens, ['0', '1'],
                       ['0.weight', '1.weight']),
    bag=(nn.EmbeddingBag(20, 4), tokens, nn.EmbeddingBag, ['weight']),
    experts=(nn.Sequential(nn.Linear(4, 4), Experts()), rows, ['1.w1', '1.w2'], ['1.w1', '1.w2']),
    experts_by_container=(nn.Sequential(nn.Linear(4, 4), Experts()), rows, '1', ['1.w1', '1.w2']),
    cond_conv=(nn.Sequential(CondConv(), nn.Conv2d(6, 2, 1)), maps, '0.weight', ['0.weight']),
    parameter_list=(Parts(), rows, 'parts.0', ['parts.0']))


@pytest.mark.parametrize('net,x,layers,names', kinds.values(), ids=kinds)
@pytest.mark.parametrize('context', ['local', 'global'])
def test_kind(net, x, layers, names, context):
    "A layer of another kind is trained and pruned: outputs are those of a new network that loads its weights"
    net = deepcopy(net)
    params = dict(net.named_parameters())
    sp = Sparsifier(net, layers=layers, context=context)
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    for sparsity in (.3, .6, .8):
        net(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        sp.prune(sparsity)
        chosen = [params[n] for n in names]
        if context == 'global': assert n_zeros(chosen) == round(sparsity*sum(p.numel() for p in chosen))
        else: assert [n_zeros([p]) for p in chosen] == [round(sparsity*p.numel()) for p in chosen]
    rest = [p for n, p in params.items() if n not in names and p.ndim > 1]
    assert all(p.all() for p in rest)
    fresh = deepcopy(net)
    for p in fresh.parameters(): p.data.fill_(1.)
    fresh.load_state_dict(net.state_dict())
    assert_same(fresh(x), net(x))


@pytest.mark.parametrize('name,granularity', [
    ('lstm', 'row'), ('gru', 'column'), ('conv1d', 'row'), ('conv1d', '2:4'), ('lstm_cell', 'layer'),
    ('transposed', 'filter'), ('deform', 'kernel'), ('bilinear', 'layer')])
def test_groups(name, granularity):
    "Groups of another kind of layer: half of them are zero as a whole"
    net, _, layers, _ = deepcopy(kinds[name])
    sp = Sparsifier(net, granularity=granularity, layers=layers)
    sp.prune(.5)
    for n, m in sp.layers.items():
        zeros = sp.granularity.zeros(m)
        if granularity != 'layer': assert int(zeros.sum()) == round(.5*zeros.numel())
        assert_same(sp.masks[n], m.weight != 0)


def test_groups_of_conv1d():
    "A row of Hugging Face's `Conv1D` makes one output, which its weight has as a column"
    net = nn.Sequential(Conv1D(8, 4))
    Sparsifier(net, granularity='row').prune(.5)
    assert sorted((net[0].weight == 0).sum(0).tolist()) == [0]*4 + [4]*4


def test_flat_weights_are_those_of_the_module():
    "The list that an LSTM computes with holds the parameters that are pruned"
    lstm = nn.LSTM(4, 6, 2)
    Sparsifier(lstm).prune(.9)
    for name, w in zip(lstm._flat_weights_names, lstm._flat_weights): assert w is getattr(lstm, name)
    x = torch.randn(3, 2, 4)
    for w in lstm.parameters():
        if w.ndim == 2: w.data.masked_fill_(w != 0, 0.)
        else: w.data.zero_()
    assert not lstm(x)[0].any()


@pytest.mark.gpu
def test_packed_weights_on_gpu():
    "cuDNN computes with the zeros of an LSTM that is pruned on a GPU"
    lstm = nn.LSTM(8, 16, 2).cuda()
    x = torch.randn(3, 2, 8).cuda()
    lstm(x)
    Sparsifier(lstm).prune(.9)
    fresh = nn.LSTM(8, 16, 2)
    fresh.load_state_dict(lstm.state_dict())
    torch.testing.assert_close(fresh(x.cpu())[0], lstm(x)[0].cpu(), rtol=1e-4, atol=1e-5)


def test_timm_cond_conv():
    "timm's conditional convolution, by the name of its parameter"
    timm = pytest.importorskip('timm')
    net = nn.Sequential(timm.layers.CondConv2d(4, 6, 3, num_experts=3))
    Sparsifier(net, layers='0.weight').prune(.5)
    assert n_zeros(net.parameters()) >= round(.5*net[0].weight.numel())


def test_embeddings_are_no_default():
    "A container and a function choose no embedding and no other parameter"
    net = nn.ModuleDict(dict(body=nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4), Experts())))
    g = get_granularity('weight')
    assert [*choose(net, None, g)] == [*choose(net, 'body', g)] == [*choose(net, lambda m: True, g)] == ['body.1']
    assert [*choose(net, ['body.0', net['body'][2]], g)] == ['body.0', 'body.2.w1', 'body.2.w2']


class TiedHead(nn.Module):
    "GPT-2 in small: transposed linear layers, and a head that shares the embedding's weight"
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(200, 8), Conv1D(8, 8), nn.Linear(8, 200, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, x): return self.head(self.block(self.embed(x)))


@pytest.mark.parametrize('layers', [None, [nn.Linear, Conv1D], lambda m: True],
                         ids=['all', 'classes', 'function'])
def test_tied_head_is_left_out(layers):
    net = TiedHead()
    with pytest.warns(UserWarning, match=r'embedding are not pruned: head\. To prune them, name them'):
        assert [*choose(net, layers, get_granularity('weight'))] == ['block']


@pytest.mark.parametrize('layers', ['head', 'embed', nn.Embedding])
def test_tied_head_by_name(layers, recwarn):
    net = TiedHead()
    Sparsifier(net, layers=layers).prune(.5)
    assert n_zeros([net.embed.weight]) == 800 and not recwarn.list


def test_coverage():
    "The share that the layers to prune hold, and the kinds that are left out, largest first"
    net = TiedHead()
    share, left_out = coverage(net, prunable(net))
    assert share == pytest.approx(64/1664) and left_out == {'Embedding': 1600/1664}
    message = r'hold 3\.8% of the model.s weight matrices\. Not pruned: Embedding \(96\.2%\)'
    with pytest.warns(UserWarning, match=message): warn_of_coverage(net, prunable(net))
    mixed = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4), Experts())
    share, left_out = coverage(mixed, choose(mixed, nn.Linear, get_granularity('weight')))
    assert left_out == {'Experts': 192/336, 'LSTM': 128/336} and share == pytest.approx(16/336)


def test_coverage_is_enough(recwarn):
    "No warning if the layers hold half of the weights, or if there is nothing to hold"
    net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    warn_of_coverage(net, prunable(net))
    warn_of_coverage(nn.Sequential(), {})
    assert not recwarn.list


def test_coverage_of_a_text_classifier():
    learn = text_classifier()
    heads = choose(learn, nn.Linear, get_granularity('weight'))
    with pytest.warns(UserWarning, match=r'Not pruned: LSTM \(\d.*\), Embedding \('): warn_of_coverage(learn, heads)
