"""The independent truth: schedules as formulas, groups as axes of a weight, selection by stable sorts, a training loop.

Nothing here uses the package, and what is pruned is always read from the weights, never from masks."""
import math

import torch
from torch import nn

from networks import n_batches, tiny_dls

### Schedules

# The formulas of the papers: from a position t in (0, 1] to the progress.
progress = dict(
    one_cycle=lambda t: (1 + math.exp(-8)) / (1 + math.exp(6 - 14*t)),
    one_shot=lambda t: float(t >= .5),
    iterative=lambda t: math.ceil((t-.2)/.8*3 - 1e-9)/3 if t >= .2 else 0,
    agp=lambda t: 1 - (1 - (t-.2)/.8)**3 if t >= .2 else 0,
    cos=lambda t: (1 - math.cos(math.pi*t)) / 2,
    lin=lambda t: t,
    dsd=lambda t: (1 - math.cos(2*math.pi*t)) / 2,
    at_start=lambda t: 1.)
rising = [s for s in progress if s != 'dsd']


def curve(schedule, target, n):
    "The sparsity after each of `n` batches"
    return [progress[schedule]((i+1)/n)*target for i in range(n)]


def expected_sparsities(schedule, target, epochs=3):
    "The sparsity after each batch of a training with `tiny_dls`"
    return curve(schedule, target, epochs*n_batches)


### Groups

# The axes that one group spans: of a convolution in the order of `canonical`, and of a linear layer's weight (out, in).
conv_axes = {'weight': (), 'row': (4,), 'column': (3,), 'kernel': (3, 4), 'channel': (2,), 'filter': (2, 3, 4),
    'shared_weight': (1,), 'shared_kernel': (1, 3, 4), '2:4': ()}
linear_axes = {'weight': (), 'row': (1,), 'column': (0,), '2:4': ()}


def layers_of(model):
    "The convolutions and linear layers, by name"
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}


def canonical(m, w):
    "A view of `w`, the weights of the layer `m`: (group, out, in, height, width) for a convolution, transposed or not"
    if isinstance(m, nn.Linear): return w
    w = w.unflatten(0, (m.groups, -1))
    return w.transpose(1, 2) if m.transposed else w


def axes(m, granularity):
    "The axes that one group spans, or None where the layer has no such groups"
    return (linear_axes if isinstance(m, nn.Linear) else conv_axes).get(granularity)


def zero_groups(m, granularity):
    "Which groups of a layer are zero in every weight, in the shape of `canonical` with axes of length 1"
    nonzero, dims = canonical(m, m.weight) != 0, axes(m, granularity)
    return ~(nonzero.any(dims, keepdim=True) if dims else nonzero)


def group_scores(m, w, granularity):
    "The mean magnitude of each group of `w`, in the same shape"
    w, dims = canonical(m, w).abs().double(), axes(m, granularity)
    return w.mean(dims, keepdim=True) if dims else w


def count_groups(model, granularity='weight'):
    "For each layer that has such groups, how many are zero and how many there are"
    zeros = {n: zero_groups(m, granularity) for n, m in layers_of(model).items() if axes(m, granularity) is not None}
    return {n: (int(z.sum()), z.numel()) for n, z in zeros.items()}


def n_zeros(model):
    "The number of zero weights of each layer, by name"
    return {n: int((m.weight == 0).sum()) for n, m in layers_of(model).items()}


def total_zeros(model):
    "The number of zero weights of all layers"
    return sum(n_zeros(model).values())


def zero_masks(model):
    "Which weights of each layer are zero, by name"
    return {n: m.weight == 0 for n, m in layers_of(model).items()}


def stay_zero(before, model):
    "Whether all weights that were zero in the `zero_masks` `before` are zero in `model`"
    now = zero_masks(model)
    return all(not (mask & ~now[n]).any() for n, mask in before.items())


def assert_counts(seen, sparsities, context='global'):
    "After each batch, each pool has exactly its number of zero groups; `seen` holds the `count_groups` of each batch"
    assert len(seen) == len(sparsities)
    for counts, s in zip(seen, sparsities):
        pools = [[c] for c in counts.values()] if context == 'local' else [list(counts.values())]
        for pool in pools:
            n_pruned, n = map(sum, zip(*pool))
            assert n_pruned == min(round(s*n), n-len(pool))


def assert_pattern(model, n_zero, m):
    "Each run of `m` weights along the input channels has `n_zero` zeros, in every layer"
    for mask in zero_masks(model).values(): assert (mask.movedim(1, -1).unflatten(-1, (-1, m)).sum(-1) == n_zero).all()


### Selection

def ranking(x, pruned):
    "Positions in the order in which they are pruned: first the pruned ones, then the lowest scores, ties by index"
    x, pruned = x.tolist(), pruned.tolist()
    return sorted(range(len(x)), key=lambda i: (not pruned[i], 0 if pruned[i] else x[i], i))


def mask_of(n, positions):
    "A mask of `n`, True at `positions`"
    res = torch.zeros(n, dtype=torch.bool)
    res[list(positions)] = True
    return res


def by_force(scores, pruned, k):
    "Masks of a pool with `k` pruned, in which each layer keeps the one that ranks last, in plain Python"
    protected, start = set(), 0
    for x, g in zip(scores, pruned):
        protected.add(start + ranking(x.flatten(), g.flatten())[-1])
        start += x.numel()
    order = ranking(torch.cat([x.flatten() for x in scores]), torch.cat([g.flatten() for g in pruned]))
    res = mask_of(start, [i for i in order if i not in protected][:k]).split([x.numel() for x in scores])
    return [r.view_as(x) for r, x in zip(res, scores)]


def by_sort(weights, pruned, k, keep=False):
    "Masks of a pool with `k` pruned by magnitude, by a stable sort; with `keep`, each layer keeps its best weight"
    keys = [w.abs().double().masked_fill(g, -1).flatten() for w, g in zip(weights, pruned)]
    for x in keys if keep else []: x[len(x)-1 - x.flip(0).argmax()] = torch.inf
    keys = torch.cat(keys)
    res = torch.zeros_like(keys, dtype=torch.bool)
    res[keys.argsort(stable=True)[:k]] = True
    return [r.view(g.shape) for r, g in zip(res.split([g.numel() for g in pruned]), pruned)]


### A whole training

def train_by_sort(model, epochs, target, context, lr=1e-2):
    "Train with `tiny_dls` and prune along one_cycle by a stable sort after each step"
    opt = torch.optim.SGD(model.parameters(), lr, momentum=.9, weight_decay=.01)
    weights = [m.weight for m in layers_of(model).values()]
    pruned = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    pools = [slice(i, i+1) for i in range(len(weights))] if context == 'local' else [slice(None)]
    batches = list(tiny_dls().train)*epochs
    model.train()
    for (xb, yb), s in zip(batches, expected_sparsities('one_cycle', target, epochs), strict=True):
        nn.functional.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
        for pool in pools:
            n = sum(w.numel() for w in weights[pool])
            pruned[pool] = by_sort([w.detach() for w in weights[pool]], pruned[pool], round(s*n))
        for w, mask in zip(weights, pruned): w.data[mask] = 0
    return model


### What a model is made of

def anatomy(model):
    "Classes, attributes and the keys of all dictionaries of every module and parameter, hooks and buffers included"
    def parts(o): return {k: [*v] if isinstance(v, dict) else type(v) for k, v in vars(o).items()}
    modules = [(n, type(m), parts(m)) for n, m in model.named_modules()]
    return modules + [(n, type(p), parts(p), p._backward_hooks) for n, p in model.named_parameters()]


def param_layout(model):
    "Address, layout and type of all parameters, and the keys of the `state_dict`: equal while changes are in place"
    params = [(id(p), p.data_ptr(), p.stride(), p.dtype, p.requires_grad) for p in model.parameters()]
    return params + [*model.state_dict()]
