"`Sparsifier` without fastai: exact counts, the default context, precisions, layouts, and channels without a filter."
import pytest, torch
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import Probe, assert_same, bits
from networks import tiny_data, tiny_dls, tiny_net, total_weights
from reference import (assert_counts, conv_axes, count_groups, expected_sparsities, layers_of, n_zeros, total_zeros,
    zero_groups)

contexts = pytest.mark.parametrize('context', ['local', 'global'])


@contexts
def test_plain_loop(context):
    "In a loop in plain PyTorch, counts are exact, and `prune` returns the fraction of the weights that are zero"
    net = tiny_net()
    opt = torch.optim.SGD(net.parameters(), 1e-2, momentum=.9, weight_decay=.01)
    sp, batches = Sparsifier(net, context=context), list(tiny_dls().train)*2
    for i, (xb, yb) in enumerate(batches):
        nn.functional.cross_entropy(net(xb), yb).backward()
        opt.step()
        s = .9*(i+1)/len(batches)
        fraction = sp.prune(s)
        opt.zero_grad()
        assert_counts([count_groups(net)], [s], context)
        assert fraction == total_zeros(net)/total_weights
    assert_same(sp.masks, {n: m.weight != 0 for n, m in layers_of(net).items()})


@pytest.mark.parametrize('granularity,default,other', [('weight', 'global', 'local'), ('kernel', 'local', 'global')])
def test_default_context(granularity, default, other):
    "Single weights form one pool, larger groups a pool for each layer"
    def pruned(*context):
        net = tiny_net()
        Sparsifier(net, granularity, *context).prune(.6)
        return n_zeros(net)
    assert pruned() == pruned(default) != pruned(other)


@pytest.mark.parametrize('granularity', [g for g in conv_axes if g != '2:4'])
def test_channels_last(granularity):
    "In channels-last layout the same weights are pruned"
    nets = [tiny_net(), tiny_net().to(memory_format=torch.channels_last)]
    for net in nets: Sparsifier(net, granularity).prune(.6)
    assert_same(*map(bits, nets))
    assert any(n_zeros(nets[1]).values())


@contexts
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, context):
    "The lowest magnitudes in the weights' own precision are pruned, ties by index"
    net = tiny_net().to(dtype)
    weights = [m.weight for m in layers_of(net).values()]
    pools = [[w] for w in weights] if context == 'local' else [weights]
    flat = [torch.cat([w.detach().abs().flatten() for w in pool]) for pool in pools]
    lowest = [f.double().argsort(stable=True)[:round(.7*len(f))].sort().values for f in flat]
    Sparsifier(net, context=context).prune(.7)
    for pool, positions in zip(pools, lowest):
        assert torch.equal(torch.cat([w.flatten() for w in pool]).eq(0).nonzero().squeeze(1), positions)
    assert all(w.dtype == dtype for w in weights)


def test_filters_silence_their_channel(new_learner):
    "Bias and batch norm are zeroed with a filter, so that its output channel is zero"
    learn = new_learner()
    def n_silent(model):
        return [int(((m.bias == 0) & (bn.weight == 0) & (bn.bias == 0)).sum()) for m, bn in (model[:2], model[3:5])]
    probe = Probe(n_silent)
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(.75, granularity='filter'), probe])
    assert probe.seen[-1] == [6, 12]
    assert probe.seen == [[round(s*8), round(s*16)] for s in expected_sparsities('one_cycle', .75)]
    x, net = tiny_data()[0], learn.model.eval()
    for i in (1, 4):
        silent = zero_groups(net[i-1], 'filter').flatten()
        out = net[:i+1](x)
        assert (out[:, silent] == 0).all() and (out[:, ~silent] != 0).any()
