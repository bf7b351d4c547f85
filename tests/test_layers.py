"The layers that are chosen agree with lists written by hand."
import re, warnings
from collections import OrderedDict

import pytest, torch
from fastai.basics import DataLoader, DataLoaders
from fastai.vision.all import unet_learner
from fastai.vision.gan import gan_critic
from torch import nn
from torch.nn.utils import parametrizations, prune as torch_prune
from torchvision import models

from helpers import assert_same, bits, run_python
from networks import tiny_net
from onecycle_prune.granularity import conv, get_granularity, linear
from onecycle_prune.layers import check_layers, choose, describe_layers, match, prunable, unwrap_model
from onecycle_prune.report import sparsity_report
from onecycle_prune.sparsifier import Sparsifier


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ModuleDict({'up': nn.ConvTranspose2d(4, 4, 3)}))
        self.body2, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 2)


class MyConv(nn.Conv2d): "A user's own"


def chosen(model, layers, granularity='weight'): return list(choose(model, layers, get_granularity(granularity)))


@pytest.mark.parametrize('layers,names', [
    (None, ['stem', 'body.0', 'body.2.up', 'body2', 'head']),
    ((conv, linear), ['stem', 'body.0', 'body.2.up', 'body2', 'head']),
    (nn.Conv2d, ['stem', 'body.0']),
    (nn.ConvTranspose2d, ['body.2.up']),
    ('head', ['head']),
    ('body', ['body.0', 'body.2.up']),  # the container, not `body2`, whose name begins in the same way
    ('body.2', ['body.2.up']),
    (lambda m: m.weight.numel() < 20, ['body2', 'head']),
    (['head', 'stem'], ['stem', 'head']),  # in the order of the model
    (['stem', nn.Conv2d, 'stem'], ['stem', 'body.0']),  # each once
    ([['head', [nn.Conv1d]], (('stem',),)], ['stem', 'body2', 'head']),
    ([lambda m: False, 'head'], ['head'])])
def test_choose(layers, names): assert chosen(Net(), layers) == names


def test_choose_module():
    net = Net()
    assert chosen(net, net.head) == ['head']
    assert chosen(net, [net.body, net.stem]) == ['stem', 'body.0', 'body.2.up']
    assert chosen(net, net) == list(prunable(net))


def test_choose_gives_modules():
    net = Net()
    assert choose(net, 'body', get_granularity('weight')) == {'body.0': net.body[0], 'body.2.up': net.body[2].up}


def test_subclass(): assert chosen(nn.Sequential(MyConv(1, 1, 1), nn.Conv2d(1, 1, 1)), MyConv) == ['0']


def test_subclass_by_base(): assert chosen(nn.Sequential(MyConv(1, 1, 1), nn.Linear(1, 1)), nn.Conv2d) == ['0']


def test_model_is_layer(): assert chosen(nn.Linear(2, 2), nn.Linear) == ['']


@pytest.mark.parametrize('layers', [None, (conv, linear), lambda m: True])
def test_granularity_chooses(layers):
    "None, a class or a function leaves out layers that do not support the granularity"
    assert chosen(Net(), layers, 'kernel') == ['stem', 'body.0', 'body.2.up', 'body2']
    assert chosen(Net(), layers, 'column') == ['stem', 'body.0', 'body.2.up', 'head']


def test_granularity_unsupported():
    with pytest.raises(ValueError, match="'head'.*Linear does not support granularity 'kernel'"):
        chosen(Net(), ['stem', 'head'], 'kernel')


@pytest.mark.parametrize('layers,message', [
    ('haed', "'haed'.*Did you mean 'head'"), ('bod', "'bod'"), (nn.BatchNorm2d, "BatchNorm2d.*Conv2d"),
    (3, '3.*Linear'),
    ([None], 'None.*Allowed: Conv1d'), (nn.Linear(2, 2), 'Linear.*a module of this model'),
    (nn.Conv3d, 'Nothing to prune.*stem, body.0'), ([], 'Nothing to prune'), (lambda m: False, 'Nothing to prune'),
    ('Conv2d', "Unknown layer: 'Conv2d'. Did you mean the class nn.Conv2d.*Allowed: body"),
    (nn.Sequential(nn.ReLU()), "Unknown layer: 'Sequential'.*Allowed: stem, .* or a module of this model")])
def test_choose_wrong(layers, message):
    with pytest.raises(ValueError, match=message): chosen(Net(), layers)


def test_choose_module_of_a_wrong_kind():
    "A module of the model that has no layer to prune raises an error that lists the layers"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="'BatchNorm2d'. Allowed: 0, or a module of this model that is or contains"):
        chosen(net, net[1])


@pytest.mark.parametrize('layers', [
    None, nn.Conv2d, MyConv, nn.LazyLinear, 'head', '', nn.BatchNorm2d(2), lambda m: True, len, (conv, linear),
    [['head', [nn.Conv1d]], (('stem',),)]])
def test_check_layers(layers): assert check_layers(layers) is None


@pytest.mark.parametrize('layers,message', [
    (nn.BatchNorm2d, 'BatchNorm2d is not a class'), (nn.Transformer, 'Transformer is not a class'),
    (nn.LayerNorm, 'LayerNorm is not a class'),
    (nn.MultiheadAttention, 'MultiheadAttention is not a class'), (Net, 'Net is not a class'),
    (int, 'int is not a class'), (nn.Module, 'Module is not a class'), (3, 'Unknown layers: 3'),
    (True, 'Unknown layers: True'), ({}, r'layers: \{\}'),
    ({nn.Conv2d: 1}, 'Unknown layers: '), (.5, r'Unknown layers: 0\.5'), ([None], 'Unknown layers: None'),
    ([nn.Conv2d, nn.ReLU], 'ReLU is not a class'), ([['head', 3]], 'Unknown layers: 3'),
    ((conv, nn.Flatten), 'Flatten is not a class')])
def test_check_layers_wrong(layers, message):
    "What cannot choose layers of any model is answered with what can, without a model"
    allowed = r'Allowed: Conv1d, .*Linear, or a name, a module, or a function of a module\.$'
    with pytest.raises(ValueError, match=f'{message}.*{allowed}'): check_layers(layers)
    with pytest.raises(ValueError, match=f'{message}.*{allowed}'): chosen(Net(), layers)


@pytest.mark.parametrize('layers,text', [
    (None, 'None'), ('head', "'head'"), (nn.Conv2d, 'Conv2d'), (nn.ReLU(), 'ReLU(...)'),
    ([nn.Conv2d, ('head', len)], "[Conv2d, ['head', len]]")])
def test_describe_layers(layers, text): assert describe_layers(layers) == text


@pytest.mark.parametrize('layers', [[], (), [[], ()]])
def test_no_layers_given(layers):
    "An empty list is answered, with and without a model"
    with pytest.raises(ValueError, match=r'Nothing to prune: layers=.* is empty'): check_layers(layers)
    with pytest.raises(ValueError, match=r'Nothing to prune: layers=.* is empty'): chosen(Net(), layers)


def test_nothing_there():
    with pytest.raises(ValueError, match='Sequential has no convolution and no linear layer'):
        chosen(nn.Sequential(nn.ReLU(), nn.Embedding(3, 3)), None)


def test_tied():
    "Two layers that share a weight are one layer, under the first name"
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert list(prunable(net)) == ['0', '1']


def test_one_module_twice():
    l = nn.Linear(4, 4)
    assert list(prunable(nn.ModuleDict(dict(a=l, b=nn.Sequential(l))))) == ['a']


def test_frozen():
    net = Net()
    for m in (net.stem, net.body2): m.requires_grad_(False)
    with pytest.warns(UserWarning, match='not pruned: stem, body2'):
        assert list(Sparsifier(net).masks) == ['body.0', 'body.2.up', 'head']


def test_frozen_bias_only(recwarn):
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].bias.requires_grad_(False)
    assert list(Sparsifier(net).masks) == ['0'] and not recwarn.list


def test_all_frozen():
    "If all layers are frozen, the warning names them, and nothing is pruned"
    net = Net().requires_grad_(False)
    before = bits(net)
    with pytest.warns(UserWarning, match='not pruned: stem, .*head'): sp = Sparsifier(net)
    assert sp.prune(.9) == 0 and not sp.masks
    assert_same(bits(net), before)


def test_attention():
    "The packed projection, or separate ones if keys and values differ in size"
    net = nn.ModuleDict(dict(a=nn.MultiheadAttention(8, 2), b=nn.MultiheadAttention(8, 2, kdim=4, vdim=6)))
    assert {n: tuple(m.weight.shape) for n, m in prunable(net).items()} == {
        'a.in_proj': (24, 8), 'a.out_proj': (8, 8), 'b.q_proj': (8, 8), 'b.k_proj': (8, 4), 'b.v_proj': (8, 6),
        'b.out_proj': (8, 8)}
    assert match('a', prunable(net)) == match(net['a'], prunable(net)) == ['a.in_proj', 'a.out_proj']
    assert len(match(nn.Linear, prunable(net))) == 6


def test_lazy():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match='no weights yet: 0, 2. Pass a batch'): prunable(net)
    net(torch.randn(2, 3, 5, 5))
    assert list(prunable(net)) == ['0', '2']


wrappers = dict(parallel=nn.DataParallel, compiled=torch.compile, both=lambda m: nn.DataParallel(torch.compile(m)))


@pytest.mark.parametrize('wrap', wrappers.values(), ids=wrappers)
def test_wrapped(wrap):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(prunable(wrap(net))) == ['0', '1'] and unwrap_model(wrap(net)) is net


@pytest.mark.parametrize('wrap', [lambda m: m, *wrappers.values()], ids=['plain', *wrappers])
def test_learner(new_learner, wrap):
    "A learner stands for its model, which may be in wrappers"
    net = tiny_net()
    learn = new_learner(wrap(net))
    assert unwrap_model(learn) is net and list(prunable(learn)) == ['0', '3', '8'] == chosen(learn, None)


def test_model_with_an_attribute_model():
    "A module is a model itself, also if it has another one as `model`"
    net = nn.Sequential(nn.Linear(2, 2))
    net.model = nn.Linear(2, 2)
    assert unwrap_model(net) is net


class Holder:
    "Has a `model` that is none"
    model = 'resnet18'
    def __repr__(self): return 'Holder()' + 1000*'.'


@pytest.mark.parametrize('model,message', [
    (nn.Linear, r'got the class Linear\. Give the model itself, say Linear\(\.\.\.\)'),
    (models.resnet18, r'got the function resnet18\. Give the model itself, say resnet18\(\)'),
    (lambda: 3, 'got <function'), ('resnet18', "got 'resnet18'"), (None, 'got None'), (3, 'got 3'), ([], r'got \[\]'),
    (Holder(), r'got Holder\(\)\.{,90}$'), (Holder, r'got the class Holder\.')])
def test_no_model(model, message):
    "What is neither a model nor a learner raises an error that says what is right"
    message = 'A model is an nn.Module, or a Learner that has one, ' + message
    for use in (unwrap_model, prunable, lambda m: chosen(m, None), Sparsifier):
        with pytest.raises(ValueError, match=message): use(model)


computed = dict(
    weight_norm=parametrizations.weight_norm, spectral_norm=parametrizations.spectral_norm,
    pruned=lambda m: torch_prune.l1_unstructured(m, 'weight', .5))


@pytest.mark.parametrize('computes', computed.values(), ids=computed)
def test_computed(computes):
    "A weight that is computed from other tensors raises an error with the name of its layer"
    net = Net()
    computes(net.body[0])
    with pytest.raises(ValueError, match=r"'body\.0' \(.*Conv2d\).*parametrization"): chosen(net, (conv, linear))
    assert chosen(net, 'head') == ['head']  # which does not concern other layers


@pytest.mark.parametrize('computes', computed.values(), ids=computed)
def test_computed_all_listed(computes):
    "Weights that are computed each time they are read are not mistaken for one shared weight"
    net = nn.Sequential(*[computes(nn.Linear(64, 64)) for _ in range(20)]).eval()
    assert len(prunable(net)) == 20


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_not_finite(value):
    net = Net()
    net.head.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"'head' \(Linear\) has NaN or infinite"): chosen(net, (conv, linear))


# Weights that cannot be pruned

class Packed(torch.Tensor):
    "A tensor that stores its values in its own way, as those of quantization libraries do"
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
    def __init__(self, inner): self.inner = inner
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default: return cls(args[0].inner)
        raise NotImplementedError(f'{func}')


def linear_with(weight):
    m = nn.Linear(4, 4)
    m.weight = nn.Parameter(weight, requires_grad=False)
    return m


def made_in_inference_mode():
    with torch.inference_mode(): return nn.Linear(4, 4)


unfit = dict(
    meta=(lambda: nn.Linear(4, 4, device='meta'), 'meta device'),
    float8=(lambda: linear_with(torch.randn(4, 4).to(torch.float8_e4m3fn)), 'float8_e4m3fn: use one of float16'),
    float8_e5m2=(lambda: linear_with(torch.randn(4, 4).to(torch.float8_e5m2)), 'float8_e5m2: use one of float16'),
    complex64=(lambda: nn.Linear(4, 4, dtype=torch.complex64), 'complex64: use one of'),
    complex128=(lambda: nn.Conv2d(4, 4, 1, dtype=torch.complex128), 'complex128: use one of'),
    int8=(lambda: linear_with(torch.ones(4, 4, dtype=torch.int8)), 'int8: use one of'),
    csr=(lambda: linear_with(torch.eye(4).to_sparse_csr()), r'layout torch.sparse_csr: convert it with `to_dense'),
    bsr=(lambda: linear_with(torch.eye(4).to_sparse_bsr((2, 2))), 'layout torch.sparse_bsr'),
    coo=(lambda: linear_with(torch.eye(4).to_sparse()), 'layout torch.sparse_coo'),
    inference=(made_in_inference_mode, 'inference mode'),
    expanded=(lambda: linear_with(torch.randn(4, 1).expand(4, 4)), r'expanded.*clone\(\)'),
    expanded_rows=(lambda: linear_with(torch.randn(4).expand(4, 4)), 'expanded'),
    subclass=(lambda: linear_with(Packed(torch.randn(4, 4))), 'is a Packed, not an ordinary tensor: prune before'),
    nan=(lambda: linear_with(torch.full((4, 4), torch.nan)), 'NaN or infinite'))
ignore_beta = pytest.mark.filterwarnings('ignore:Sparse')


@ignore_beta
@pytest.mark.parametrize('make,message', unfit.values(), ids=unfit)
@pytest.mark.parametrize('granularity', ['weight', '2:4'])
def test_unfit(make, message, granularity):
    "A weight that is no ordinary tensor is refused by name, and the error says which layers can be pruned"
    net = nn.ModuleDict(dict(a=nn.Linear(4, 4), b=make()))
    with pytest.raises(ValueError, match=rf"Layer 'b' \(\w+\).*{message}.*leave it out, use layers=\['a'\]\.$"):
        chosen(net, None, granularity)
    assert chosen(net, ['a'], granularity) == ['a']


@ignore_beta
@pytest.mark.parametrize('make,message', unfit.values(), ids=unfit)
def test_unfit_in_a_report(make, message):
    "A report counts what it can, and warns of the rest"
    net = nn.ModuleDict(dict(a=nn.Linear(4, 4, bias=False), b=make()))
    net['b'].bias = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        report = sparsity_report(net)
    opaque = any('cannot be counted are not in the report: b.' in str(w.message) for w in caught)
    assert report.iloc[-1].weights == (16 if opaque else 32)
    assert opaque == any(word in message for word in ('meta', 'layout', 'Packed'))


process_group = '''
    import os, torch
    os.environ |= dict(MASTER_ADDR='localhost', MASTER_PORT='0')
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    from torch import nn
    from onecycle_prune.report import sparsity_report
    from onecycle_prune.sparsifier import Sparsifier
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
'''
sharded = dict(
    fsdp2=('''
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    fully_shard(net, mesh=init_device_mesh('cpu', (1,)))
    ''', ["layers '0' (", 'is a DTensor', 'DistributedDataParallel works']),
    tensor_parallel=('''
    from torch.distributed.tensor import distribute_tensor, Shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh('cpu', (1,))
    net[1].weight = nn.Parameter(distribute_tensor(net[1].weight.detach(), mesh, [Shard(0)]))
    ''', ["'1' (Linear) is a DTensor", "use layers=['0']"]),
    fsdp1=('''
    from torch.distributed.fsdp import FullyShardedDataParallel
    net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device('cpu'))
    ''', ['FullyShardedDataParallel', 'Train with DistributedDataParallel']))


@pytest.mark.parametrize('shard,words', sharded.values(), ids=sharded)
def test_sharded(shard, words):
    "A sharded model is refused with what works, and a report of it does not fail"
    run = run_python(process_group + shard + '''
    try: Sparsifier(net)
    except ValueError as e: print(e)
    sparsity_report(net)
    torch.distributed.destroy_process_group()
    ''', capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(word in run.stdout for word in words), run.stdout


def advice(model, layers=None, granularity='weight'):
    "The error, and the layers that are chosen if one writes what it advises"
    with pytest.raises(ValueError) as e: chosen(model, layers, granularity)
    written = re.search(r'use layers=(.*)\.$', str(e.value))
    return str(e.value), chosen(model, eval(written[1]), granularity) if written else []


def unet():
    items = [(torch.zeros(3, 32, 32), torch.zeros(32, 32).long())]
    dls = DataLoaders(DataLoader(items, bs=1), DataLoader(items, bs=1))
    return unet_learner(dls, models.resnet18, n_out=2, pretrained=False, normalize=False, self_attention=True,
                        loss_func=nn.CrossEntropyLoss()).model


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_advice_self_attention():
    "A U-Net with self-attention, whose spectral norms are of the old kind"
    net = unet()
    message, rest = advice(net)
    names = [n for n, m in net.named_modules() if hasattr(m, 'weight_orig')]
    assert len(names) == 3 and all(f"'{n}' (" in message for n in names) and message.count('computes its weight') == 1
    assert set(rest) == set(prunable(net)) - set(names) and len(message) < 1000


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_advice_critic():
    "fastai's critic, in which each layer has a spectral norm: no layer is left to choose"
    net = gan_critic(nf=8, n_blocks=1)
    message, _ = advice(net)
    assert all(f"'{n}'" in message for n in prunable(net)) and message.endswith('No other layer was chosen.')


@pytest.mark.parametrize('make,unfit', [
    (models.resnet18, ['conv1']), (lambda: models.vgg11_bn(num_classes=8), ['features.0']),
    (lambda: models.mobilenet_v2(width_mult=.5), None), (lambda: models.densenet121(num_classes=4), ['features.conv0']),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LSTM(3, 8), nn.Linear(8, 8)), ['0', '1.weight_ih_l0'])])
def test_advice_2_4(make, unfit):
    "A pattern on a whole network, whose first layer has three inputs"
    net = make()
    message, rest = advice(net, granularity='2:4')
    by_hand = [n for n, m in prunable(net).items() if m.weight.shape[1] % 4]
    assert by_hand == (unfit or by_hand) and all(f"'{n}' (" in message for n in by_hand)
    assert rest == [n for n in prunable(net) if n not in by_hand]
    assert len(message.partition('To leave')[2]) < 250


@pytest.mark.parametrize('names', [['0'], ['0', '3'], ['8', '3']])
def test_advice_nan(names):
    "All layers with NaN are named at once, and nothing has changed"
    net = tiny_net()
    for n in names: net[int(n)].weight.data[0, 0] = torch.nan
    before = bits(net)
    message, rest = advice(net)
    assert all(f"'{n}'" in message for n in names) and rest == [n for n in '038' if n not in names]
    assert_same(bits(net), before)


def test_advice_of_several_reasons():
    "Different reasons are named in one error"
    net = tiny_net()
    net[3].weight.data[0, 0] = torch.inf
    parametrizations.weight_norm(net[0])
    message, rest = advice(net)
    assert 'computes its weight' in message and 'NaN or infinite' in message and rest == ['8']


def test_advice_keeps_the_choice():
    "The advice is about the layers that were asked for"
    net = Net()
    net.body[0].weight.data[0] = torch.nan
    assert advice(net, ['body', 'head'])[1] == ['body.2.up', 'head']
    assert advice(net, nn.Conv2d)[1] == ['stem']


def test_container_misspelled():
    "The hint for a misspelled container is the container with the nearest name"
    layer1, layer4 = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net = nn.Sequential(OrderedDict(layer1=layer1, layer4=layer4))
    with pytest.raises(ValueError, match="'layer5'. Did you mean 'layer[14]'"): Sparsifier(net, layers='layer5')
