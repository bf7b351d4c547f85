"Groups of weights agree with loops over single weights."
import re
from collections import defaultdict
from itertools import product

import pytest, torch
from torch import nn

from networks import fill
from onecycle_prune.granularity import NM, Granularity, get_granularity, granularities, granularity_aliases
from onecycle_prune.sparsifier import Sparsifier

layers = dict(
    conv1d=nn.Conv1d(4, 3, 3), conv2d=nn.Conv2d(3, 4, (2, 3)), conv3d=nn.Conv3d(2, 3, (2, 3, 2)),
    up1d=nn.ConvTranspose1d(4, 3, 3), up2d=nn.ConvTranspose2d(3, 4, (2, 3)), up3d=nn.ConvTranspose3d(2, 3, (2, 3, 2)),
    grouped1d=nn.Conv1d(4, 6, 2, groups=2), grouped2d=nn.Conv2d(6, 4, (2, 3), groups=2),
    grouped3d=nn.Conv3d(4, 2, (1, 2, 3), groups=2), grouped_up1d=nn.ConvTranspose1d(4, 6, 2, groups=2),
    grouped_up2d=nn.ConvTranspose2d(6, 4, (2, 3), groups=2), grouped_up3d=nn.ConvTranspose3d(4, 2, (1, 2, 3), groups=2),
    depthwise=nn.Conv2d(5, 5, (2, 3), groups=5), multiplied=nn.Conv2d(3, 6, 2, groups=3),
    depthwise_up=nn.ConvTranspose2d(5, 5, (2, 3), groups=5),
    linear=nn.Linear(5, 4), last2d=nn.Conv2d(3, 4, (2, 3)).to(memory_format=torch.channels_last),
    last_grouped=nn.Conv2d(6, 4, (2, 3), groups=2).to(memory_format=torch.channels_last))

# Two weights are in one group if they share all of these: the output channel that they make, the input channel that
# they read, and their position in depth, height and width.
together = dict(
    weight='out in d h w',
    row='out in d h', column='out in d w', depth='out in h w',  # a vector along the width, the height, the depth
    channel='out d h w',                                        # a vector through the inputs at one position
    kernel='out in',                                            # what one output channel does with one input channel
    horizontal_slice='out d h', vertical_slice='out d w',       # a filter's row, or column, through all its inputs
    filter='out',                                               # all weights of one output channel
    structured='out',                                           # the same, in each layer that writes the channel
    # The same across all filters that read the same inputs: of a grouped convolution, those of one of its groups.
    shared_weight='group in d h w', shared_row='group in d h', shared_column='group in d w',
    shared_depth='group in h w',
    shared_channel='group d h w', shared_kernel='group in',
    shared_horizontal_slice='group d h', shared_vertical_slice='group d w',
    layer='')
# Of a weight matrix, a row makes one output and a column reads one input.
together_linear = dict(weight='out in', row='out', column='in', structured='out', head='out', layer='')


def coords(m, i):
    "The group, the channels (counted over the whole layer) and the position of the weight at index `i`"
    groups, n = getattr(m, 'groups', 1), m.weight.shape
    if getattr(m, 'transposed', False):  # (inputs, outputs of one group, ...)
        g = i[0] // (n[0]//groups)
        c = {'group': g, 'in': i[0], 'out': g*n[1] + i[1]}
    else:                                # (outputs, inputs of one group, ...)
        g = i[0] // (n[0]//groups)
        c = {'group': g, 'out': i[0], 'in': g*n[1] + i[1]}
    return c | dict(zip('whd', reversed(i[2:])))


def indices(m): return product(*map(range, m.weight.shape))


def groups(m, words):
    "The weight indices of each group; groups are in the order of their first index"
    res = defaultdict(list)
    for i in indices(m):
        c = coords(m, i)
        res[tuple(c[w] for w in words.split() if w in c)].append(i)
    return list(res.values())


def words_of(m): return together_linear if isinstance(m, nn.Linear) else together


def supported(m):
    "The granularities that `m` supports: a vector along a spatial axis, or a slice across it, needs that axis"
    needs = dict(column='h', depth='d', horizontal_slice='w', vertical_slice='h')
    space = '' if isinstance(m, nn.Linear) else 'dhw'[3-(m.weight.dim()-2):]
    return [n for n in words_of(m) if needs.get(n.removeprefix('shared_'), '') in space or isinstance(m, nn.Linear)]


cases = [pytest.param(m, n, id=f'{name}-{n}') for name, m in layers.items() for n in supported(m)]


@pytest.mark.parametrize('m', layers.values(), ids=layers)
def test_supports(m):
    assert {n for n in {*together, *together_linear} if Granularity(n).supports(m)} == set(supported(m))


def test_all_named(): assert set(granularities) == {*together, *together_linear, *granularity_aliases}


def test_alias():
    "`unstructured` is a second name of `weight`, also when the class is called"
    assert granularity_aliases == dict(unstructured='weight')
    for g in (get_granularity('unstructured'), Granularity('unstructured')):
        assert g.name == 'weight' and g.supports(nn.Conv2d(3, 3, 3)) and g.supports(nn.Linear(3, 3))


@pytest.mark.parametrize('m,name', cases)
def test_groups(m, name):
    "Reduced scores are the means of the groups, and an expanded mask of one group covers its weights and no others"
    gran, found = Granularity(name), groups(m, words_of(m)[name])
    scores = torch.rand(m.weight.shape, dtype=torch.float64)
    reduced = gran.reduce(scores, m)
    assert reduced.numel() == len(found)
    remaining = {tuple(group) for group in found}
    for at in range(len(found)):
        mask = torch.zeros(reduced.shape, dtype=torch.bool)
        mask.view(-1)[at] = True
        expanded = gran.expand(mask, m)
        assert expanded.shape == m.weight.shape
        group = tuple(i for i in indices(m) if expanded[i])
        remaining.remove(group)  # each exactly once
        mean = sum(scores[i].item() for i in group) / len(group)
        assert reduced.flatten()[at].item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize('m', [pytest.param(m, id=n) for n, m in layers.items() if n != 'linear'])
def test_filter_order(m):
    "Filters are in the order of the output channels, like biases"
    scores = torch.zeros(m.weight.shape)
    for i in indices(m): scores[i] = coords(m, i)['out']
    assert Granularity('filter').reduce(scores, m).flatten().tolist() == list(range(m.out_channels))


@pytest.mark.parametrize('m,name', cases)
def test_zeros(m, name):
    "A group is zero if all its weights are zero: not if one is not zero, and not if their sum is zero"
    gran, found = Granularity(name), groups(m, words_of(m)[name])
    w = torch.ones(m.weight.shape)
    empty = found[::3]
    for i in sum(empty, []): w[i] = 0.
    w[empty[0][0]] = -1e-30  # one weight that is not zero is enough
    for n, i in enumerate(found[-1]): w[i] = (-1.)**n
    with torch.no_grad(): m.weight.copy_(w)
    zero = {i for g in empty[1:] if g is not found[-1] for i in g}
    res = gran.zeros(m)
    assert res.dtype == torch.bool and res.shape == gran.reduce(m.weight.detach(), m).shape
    assert {i for i in indices(m) if gran.expand(res, m)[i]} == zero


def test_negative_zero():
    m = fill(nn.Linear(2, 1), [-0., 1.])
    assert Granularity('weight').zeros(m).flatten().tolist() == [True, False]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half(dtype):
    "The mean of 1024 values in half precision does not overflow and is as exact as in single precision"
    m = nn.Conv2d(1024, 1, 1)
    scores = torch.full(m.weight.shape, 1000., dtype=dtype)
    scores[0, 0] = 1504  # exact in bfloat16 too
    assert Granularity('filter').reduce(scores, m).item() == 1000 + 504/1024


@pytest.mark.parametrize('name', ['weight', 'kernel', 'filter', 'shared_row'])
def test_channels_last(name):
    "The same weights are pruned in any memory layout, and the layout stays"
    plain, last = nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(8, 6, 3, groups=2).to(memory_format=torch.channels_last)
    fill(last, plain.weight.detach())
    for m in (plain, last): Sparsifier(m, name).prune(.5)
    assert (plain.weight == 0).any() and torch.equal(plain.weight, last.weight)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)


# n:m patterns

nm_layers = dict(
    linear=lambda: nn.Linear(16, 3), conv1d=lambda: nn.Conv1d(8, 3, 2), conv2d=lambda: nn.Conv2d(8, 3, (2, 3)),
    conv3d=lambda: nn.Conv3d(8, 2, (1, 2, 2)), grouped=lambda: nn.Conv2d(16, 4, 2, groups=2),
    up1d=lambda: nn.ConvTranspose1d(8, 3, 2), up2d=lambda: nn.ConvTranspose2d(8, 3, (2, 3)),
    grouped_up=lambda: nn.ConvTranspose2d(16, 4, 2, groups=2),
    last=lambda: nn.Conv2d(8, 3, 2).to(memory_format=torch.channels_last))
nm_cases = [(layer, n, m) for layer in nm_layers for n, m in [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]]


def blocks(layer, m):
    "The weight indices of every `m` neighbours along the input channels, at one position of one filter"
    return [vector[i:i+m] for vector in groups(layer, together['channel']) for i in range(0, len(vector), m)]


def lowest_of_blocks(layer, n, m):
    "Indices of the weights that an n:m pattern prunes: the m-n smallest of each block, with the lower index of ties"
    w = layer.weight.detach().abs()
    return {i for block in blocks(layer, m) for i in sorted(block, key=lambda i: w[i].item())[:m-n]}


def zeroed(layer): return {i for i in indices(layer) if layer.weight[i] == 0}


@pytest.mark.parametrize('name,n,m', nm_cases)
def test_nm(name, n, m):
    "Exactly n of every m are kept, the largest; until then the lowest of the others are pruned, as many as asked"
    layer = nm_layers[name]()
    w, to_prune = layer.weight.detach().abs().clone(), lowest_of_blocks(layer, n, m)
    total, order = w.numel(), sorted(to_prune, key=lambda i: (w[i].item(), i))
    assert len(to_prune)*m == total*(m-n)
    sp, final = Sparsifier(layer, f'{n}:{m}'), (m-n)/m
    for progress in (.1, .37, .8, 1):
        sp.prune(progress*final)
        assert zeroed(layer) == set(order[:round(progress*final*total)])


@pytest.mark.parametrize('name', nm_layers)
def test_nm_ties(name):
    layer = nm_layers[name]()
    fill(layer, torch.ones(layer.weight.shape))
    to_prune = lowest_of_blocks(layer, 2, 4)
    Sparsifier(layer, '2:4').prune(.5)
    assert zeroed(layer) == to_prune


def test_nm_moving():
    "The final pattern is right although the weights change their order during the training"
    layer = nn.Conv2d(8, 4, 3)
    sp = Sparsifier(layer, '2:4')
    for step in range(1, 11):
        with torch.no_grad(): layer.weight.add_(torch.randn_like(layer.weight))
        pruned = zeroed(layer)
        sp.prune(.05*step)
        assert pruned <= zeroed(layer) and len(zeroed(layer)) == round(.05*step*288)
    assert all(sum(i in zeroed(layer) for i in block) == 2 for block in blocks(layer, 4))


@pytest.mark.parametrize('n_zero', [3, 4, 8])
def test_nm_zeros_before(n_zero):
    "Of the weights that are zero from the start, no more count as pruned than the pattern prunes in a block"
    layer = fill(nn.Linear(8, 1), [0.]*n_zero + [float(i) for i in range(1, 9-n_zero)])
    sp = Sparsifier(layer, '2:4')
    sp.prune(.5)
    kept = sp.masks[''].view(2, 4).sum(1).tolist()
    assert kept == [2, 2]


def test_nm_global():
    "Each layer of a pool has the pattern in the end"
    small, large = torch.arange(1, 65)/1000, torch.arange(1., 33)
    net = nn.Sequential(fill(nn.Linear(8, 8), small), nn.ReLU(), fill(nn.Linear(8, 4), large))
    sp = Sparsifier(net, '2:4', context='global')
    sp.prune(.25)
    # 24 of the 96 weights are pruned. The first layer has the smallest, of which the pattern allows 32.
    assert [len(zeroed(net[i])) for i in (0, 2)] == [24, 0]
    sp.prune(.5)
    assert all(sum(i in zeroed(net[l]) for i in block) == 2 for l in (0, 2) for block in blocks(net[l], 4))


@pytest.mark.parametrize('name,s', [('2:4', .5), ('1:4', .75), ('4:8', .5), ('1:16', .9375), ('3:4', .25)])
def test_nm_implies(name, s): assert get_granularity(name).sparsity == s


def test_others_imply_nothing(): assert get_granularity('filter').sparsity is None


@pytest.mark.parametrize('name', ['0:4', '4:4', '4:2', '0:0'])
def test_wrong_nm(name):
    with pytest.raises(ValueError, match=f"0 < n < m, got '{name}'"): get_granularity(name)


@pytest.mark.parametrize('name', ['2:', ':4', '2:4:8', '-2:4', '2 of 4', '2.0:4'])
def test_nm_unknown(name):
    with pytest.raises(ValueError, match="Unknown granularity.* '2:4'"): get_granularity(name)


@pytest.mark.parametrize('layer,n_in', [
    (nn.Conv2d(6, 4, 1), 6), (nn.Conv2d(12, 4, 1, groups=2), 6), (nn.ConvTranspose2d(12, 4, 1, groups=2), 6),
    (nn.Conv2d(8, 8, 3, groups=8), 1), (nn.Linear(3, 4), 3)])
def test_nm_indivisible(layer, n_in):
    "The input channels of one group of a grouped convolution must divide by m"
    with pytest.raises(ValueError, match=f"'it'.* {n_in} input channels do not divide by 4"):
        Sparsifier(nn.ModuleDict({'it': layer}), '2:4')


@pytest.mark.parametrize('name,right', [
    ('weigth', 'weight'), ('filters', 'filter'), ('Kernel', 'kernel'), ('sharedrow', 'shared_row'), ('layers', 'layer'),
    ('Unstructured', 'unstructured'), ('l1_unstructured', 'unstructured'), ('chanel', 'channel')])
def test_nearest(name, right):
    with pytest.raises(ValueError, match=f"{name}.*Did you mean '{right}'\\?.*horizontal_slice.*unstructured"):
        get_granularity(name)


neuron = "'filter' for convolutions, or 'row' with layers=nn.Linear"
a_group = "a group of weights, such as 'filter' or 'structured', or a pattern, such as '2:4'"


@pytest.mark.parametrize('word,right', [
    ('channels', "'filter'"), ('out_channel', "'filter'"), ('out_channels', "'filter'"), ('out channels', "'filter'"),
    ('OutChannels', "'filter'"), ('output_channel', "'filter'"), ('output-channels', "'filter'"),
    ('channelwise', "'filter'"), ('channel-wise', "'filter'"), ('feature_map', "'filter'"),
    ('neuron', neuron), ('neurons', neuron), ('unit', neuron), ('outputs', neuron),
    ('in_channels', "'shared_kernel'"), ('input_channel', "'shared_kernel'"), ('input channels', "'shared_kernel'"),
    ('inputs', "'shared_kernel' for convolutions, or 'column' with layers=nn.Linear"),
    ('out_features', "'row' with layers=nn.Linear"), ('in_features', "'column' with layers=nn.Linear"),
    ('element', "'weight'"), ('elementwise', "'weight'"), ('fine', "'weight'"), ('fine-grained', "'weight'"),
    ('coarse_grained', a_group), ('ln_structured', a_group), ('semi-structured', "'2:4'"), ('semistructured', "'2:4'"),
    ('heads', "'head'"), ('attention_heads', "'head'"),
    ('nm', "'2:4'"), ('n:m', "'2:4'"), ('width', "'row', a vector along the width"),
    ('height', "'column', a vector along the height"), ('local', "context='local'"), ('layerwise', "context='local'"),
    ('global', "context='global'")])
def test_hints(word, right):
    "A word of another library is answered with the same groups, or with what it means here"
    with pytest.raises(ValueError, match=f'Did you mean {re.escape(right)}[?] Allowed: weight'): get_granularity(word)


@pytest.mark.parametrize('word', ['block', 'vector', 'slice', 'group', 'pixel', 'tensor'])
def test_no_hint(word):
    "A word that no granularity here means has no hint"
    with pytest.raises(ValueError, match='^((?!Did you mean).)*$'): get_granularity(word)


@pytest.mark.parametrize('words,name', [('output channel', 'filter'), ('input channel', 'shared_kernel')])
def test_hints_mean_the_same(words, name):
    "A filter is one output channel of a convolution, and a shared kernel is one input channel"
    m = nn.Conv2d(3, 4, 2)
    at = dict(filter=0, shared_kernel=1)[name]
    assert groups(m, together[name]) == [[i for i in indices(m) if i[at] == c] for c in range(m.weight.shape[at])]


def test_hints_for_linear_layers():
    "A row of a linear layer is one output neuron, and a column is one input"
    m = nn.Linear(3, 4)
    for name, at in (('row', 0), ('column', 1)):
        mask = torch.zeros(Granularity(name).reduce(m.weight.detach(), m).shape, dtype=torch.bool)
        mask.view(-1)[2] = True
        assert {i for i in indices(m) if Granularity(name).expand(mask, m)[i]} == {i for i in indices(m) if i[at] == 2}


def test_class():
    "A class is not a granularity, and its instance is"
    with pytest.raises(ValueError, match="Did you mean an instance, such as Granularity.'filter'.*Allowed: weight"):
        get_granularity(Granularity)
    with pytest.raises(ValueError, match="Did you mean '2:4'.*Allowed: weight"): get_granularity(NM)


def test_repr():
    assert repr(get_granularity('filter')) == "Granularity('filter')" and repr(get_granularity('2:4')) == "NM('2:4')"
    assert str(get_granularity('filter')) == "'filter'"  # in messages


@pytest.mark.parametrize('name', [None, 2, '', ['kernel'], nn.Conv2d])
def test_unknown(name):
    with pytest.raises(ValueError, match="Unknown granularity: .*weight.*'2:4'"): get_granularity(name)


@pytest.mark.parametrize('layer,name', [
    (nn.Linear(4, 4), 'filter'), (nn.Linear(4, 4), 'kernel'), (nn.Conv1d(4, 4, 3), 'column'),
    (nn.Conv2d(4, 4, 3), 'depth')])
def test_unsupported(layer, name):
    "A layer that is chosen by name and has no such groups raises an error that lists those it has"
    message = f"'it'.*{type(layer).__name__} does not support granularity '{name}', only 'weight'"
    with pytest.raises(ValueError, match=message):
        Sparsifier(nn.ModuleDict({'it': layer}), name, layers='it')
