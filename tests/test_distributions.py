"How a budget is divided over layers: by shapes, by scores, by costs; and trainings in which it is"

import numpy as np, pytest, torch, torchvision
from hypothesis import given, settings, strategies as st
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.deploy.costs import milliseconds
from onecycle_prune.distributions import ByCost, ERK, LAMP, Share, distributions
from onecycle_prune.granularity import get_granularity
from onecycle_prune.pools import get_context
from onecycle_prune.select.histogram import score_bins
from onecycle_prune.select.reference import Problem
from onecycle_prune.sparsifier import Sparsifier
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers import Probe, assert_resumes, assert_same, bits
from networks import adam, momentum_sgd, tiny_images, tiny_net
from reference import expected_sparsities, layers_of

by_distribution = pytest.mark.parametrize('context', list(distributions))


def erk_densities(shapes, density):
    "As Evci et al. do it: the layer that would keep most is made dense, until no layer would keep more than it has"
    raw, sizes, dense = [sum(o)/np.prod(o) for o in shapes], [np.prod(o) for o in shapes], set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        if not rest: return [1.]*len(shapes)
        scale = (density*sum(sizes) - sum(sizes[i] for i in dense)) / sum(raw[i]*sizes[i] for i in rest)
        highest = max(raw[i] for i in rest)
        if highest*scale <= 1: return [1. if i in dense else raw[i]*scale for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == highest}


def shares_of(shapes): return [Share(str(i), o, int(np.prod(o)), 0) for i, o in enumerate(shapes)]


def lamp_counts(weights, k):
    "As Lee et al. do it, by a sort of each layer; how many weights of each are among the `k` lowest"
    scores, layer = [], []
    for i, w in enumerate(weights):
        squares = np.sort(w.ravel().astype(float)**2)
        scores.append(squares/squares[::-1].cumsum()[::-1])
        layer.append(np.full(len(squares), i))
    lowest = np.argsort(np.concatenate(scores), kind='stable')[:k]
    return np.bincount(np.concatenate(layer)[lowest], minlength=len(weights))


def share_of(name, w, pruned=None):
    w = torch.as_tensor(w, dtype=torch.float)
    pruned = torch.zeros_like(w, dtype=torch.bool) if pruned is None else pruned
    (scores, counts), = score_bins([Problem([pruned], 0, lambda: [w.abs()])])
    return Share(name, tuple(w.shape), w.numel(), int(pruned.sum()), scores, counts)


def left_in_flops(net, x):
    "The share of the multiply-adds of convolutions and linear layers whose weights are not zero, by torch's counter"
    with torch.no_grad(), FlopCounterMode(display=False) as counter: net(x)
    counts, left, total = counter.get_flop_counts(), 0, 0
    for n, m in layers_of(net).items():
        flops = sum(counts[f'{type(net).__name__}.{n}'].values())
        total += flops
        left += flops*float((m.weight != 0).double().mean())
    return left/total


shapes = st.lists(st.one_of(
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5), st.integers(1, 5))), min_size=1, max_size=8)


class TestERK:
    @settings(deadline=None, max_examples=200)
    @given(shapes, st.floats(0, 1))
    def test_published_iteration(self, shapes, sparsity):
        counts, sizes = ERK().divide(sparsity, shares_of(shapes)), np.array([np.prod(o) for o in shapes])
        budget = round(sparsity*sizes.sum())
        assert counts.sum() == min(budget, (sizes - 1).sum()) and (counts < sizes).all()
        if budget == sizes.sum(): return
        expected = sizes*(1 - np.array(erk_densities(shapes, 1 - budget/sizes.sum())))
        if (expected <= sizes - 1).all(): assert np.abs(counts - expected).max() <= 1

    @pytest.mark.slow
    @pytest.mark.parametrize('sparsity,flops', [(.8, .42), (.9, .24), (.95, .12), (.965, .09)])
    def test_published_flops(self, sparsity, flops):
        "The share of the operations of ResNet-50 in the table of the authors of RigL"
        net = torchvision.models.resnet50().eval()
        Sparsifier(net, context='erk').prune(sparsity)
        assert left_in_flops(net, torch.randn(1, 3, 224, 224)) == pytest.approx(flops, abs=.01)

    def test_pruned_before(self):
        "Pruned weights stay pruned, and the other layers divide the rest"
        shares = shares_of([(10, 10), (100, 100)])
        shares[0].n_pruned = 90
        assert ERK().divide(.5, shares).tolist() == [90, 5050 - 90]

    def test_return(self):
        "If more is pruned than asked for, the budget is divided again"
        shares = shares_of([(10, 10), (100, 100)])
        shares[1].n_pruned = 9000
        assert ERK().divide(.5, shares).sum() == 5050


class TestLAMP:
    def test_by_hand(self):
        "In a layer of 1, 2, 2 the scores are 1/9, 4/8, 1; in a layer of 4, 10 they are 16/116, 1"
        shares = [share_of('a', [2, 1, 2]), share_of('b', [4, 10])]
        assert [LAMP().divide(k/5, shares).tolist() for k in (1, 2, 3)] == [[1, 0], [1, 1], [2, 1]]

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.floats(.05, .95), st.integers(0, 9))
    def test_sort(self, sizes, sparsity, seed):
        "As a sort of all weights finds it, up to the width of a bin"
        rng = np.random.default_rng(seed)
        weights = [rng.normal(size=n)*10**rng.normal() for n in sizes]
        k = min(round(sparsity*sum(sizes)), sum(sizes) - len(sizes))
        counts = LAMP().divide(sparsity, [share_of(str(i), w) for i, w in enumerate(weights)])
        assert counts.sum() == k
        assert np.abs(counts - lamp_counts(weights, k)).max() <= 2 + .02*max(sizes)

    def test_negative_scores(self):
        with pytest.raises(ValueError, match='needs scores of 0 or more'):
            Sparsifier(tiny_net(), context='lamp', criteria='small_final').prune(.5)


class TestByCost:
    @pytest.mark.slow
    @pytest.mark.parametrize('arch', ['resnet18', 'mobilenet_v2', 'vgg11_bn'])
    @pytest.mark.parametrize('share', [.5, .9])
    def test_multiply_adds(self, arch, share):
        "The share that is asked for, by torch's own counter"
        torch.manual_seed(0)
        net, x = torchvision.models.get_model(arch).eval(), torch.randn(2, 3, 64, 64)
        Sparsifier(net, context='multiply_adds', inputs=x).prune(share)
        assert left_in_flops(net, x) == pytest.approx(1 - share, abs=.01)

    def test_any_costs(self):
        "A layer that costs nothing stays dense; the budget is a share of the costs"
        net = tiny_net()
        layers = layers_of(net)
        costs = {n: 0 if i == 0 else i for i, n in enumerate(layers)}
        Sparsifier(net, context=ByCost(costs)).prune(.7)
        left = {n: int(m.weight.count_nonzero()) for n, m in layers.items()}
        first = next(iter(layers))
        assert left[first] == layers[first].weight.numel()
        total = sum(costs[n]*m.weight.numel() for n, m in layers.items())
        assert sum(costs[n]*o for n, o in left.items()) == pytest.approx(.3*total, abs=max(costs.values()))

    @pytest.mark.parametrize('costs', [{}, None, {'a': -1}, {'a': 'much'}, {'a': float('nan')}, [1, 2]], ids=str)
    def test_wrong(self, costs):
        with pytest.raises(ValueError, match='costs is a dictionary'): ByCost(costs)

    def test_nothing_to_save(self):
        with pytest.raises(ValueError, match='All costs are 0'): ByCost({'a': 0})

    def test_missing(self):
        with pytest.raises(ValueError, match='no cost for: .*It has: other'):
            Sparsifier(tiny_net(), context=ByCost({'other': 1}))

    def test_without_inputs(self):
        with pytest.raises(ValueError, match='give `inputs`'): Sparsifier(tiny_net(), context='multiply_adds')

    def test_unused_layer(self):
        "A layer that a forward pass does not use has no multiply-adds"
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.unused = nn.Linear(4, 50), nn.Linear(50, 2), nn.Linear(50, 50)
            def forward(self, x): return self.b(self.a(x))
        net = Net()
        with pytest.warns(UserWarning, match='they stay dense: unused'):
            sp = Sparsifier(net, context='multiply_adds', inputs=torch.randn(3, 4))
        sp.prune(.5)
        assert net.unused.weight.all() and not net.a.weight.all()


class TestBins:
    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.floats(-2.**60, 2.**60, width=32), min_size=1, max_size=50), st.integers(0, 5))
    def test_bins(self, numbers, seed):
        "Each score is within .8 % of the score of its bin, with and without numba"
        w = torch.tensor(numbers)
        pruned = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < .3
        plain = Problem([pruned], int(pruned.sum()), lambda: [w.abs()], weights=[w])
        general = Problem([pruned], int(pruned.sum()), lambda: [w.abs()])
        (scores, counts), = score_bins([plain])
        assert_same(torch.tensor(scores), torch.tensor(score_bins([general])[0][0]))
        assert_same(torch.tensor(counts), torch.tensor(score_bins([general])[0][1]))
        expected = np.sort(w.abs()[~pruned].double().numpy())
        found = np.repeat(scores, counts)
        assert len(found) == len(expected) and (np.abs(found - expected) <= .008*expected + 1e-37).all()

    def test_signs(self):
        w = torch.tensor([-8., -2., -.5, 0., .5, 3.])
        (scores, counts), = score_bins([Problem([torch.zeros(6, dtype=torch.bool)], 0, lambda: [w])])
        np.testing.assert_allclose(scores, w.numpy(), rtol=.008)
        assert counts.tolist() == [1]*6 and (np.diff(scores) > 0).all()


class TestTraining:
    "Promises of every training hold for each distribution"
    @by_distribution
    @pytest.mark.parametrize('opt_func', [momentum_sgd, adam], ids=['sgd', 'adam'])
    def test_exact(self, new_learner, context, opt_func):
        net = tiny_net()
        layers = layers_of(net)
        sizes = {n: m.weight.numel() for n, m in layers.items()}
        costs = positions(net) if context == 'multiply_adds' else dict.fromkeys(sizes, 1)
        spent = Probe(lambda net: {n: int((m.weight == 0).sum()) for n, m in layers_of(net).items()})
        new_learner(net, opt_func=opt_func).fit_one_cycle(3, 1e-2, cbs=[SparsifyCallback(.8, context=context), spent])
        total = sum(costs[n]*sizes[n] for n in sizes)
        for counts, s in zip(spent.seen, expected_sparsities('one_cycle', .8), strict=True):
            found = sum(costs[n]*counts[n] for n in sizes)
            if context == 'multiply_adds': assert s*total - max(costs.values()) <= found <= s*total*(1 + 1e-9)
            else: assert found == round(s*total)
            assert all(counts[n] < sizes[n] for n in sizes)

    @by_distribution
    @pytest.mark.parametrize('criteria', ['large_final', 'movement', 'taylor', 'random'])
    def test_resume(self, new_learner, context, criteria):
        assert_resumes(lambda: new_learner(tiny_net()), starts=[1, 3], sparsity=.8, context=context, criteria=criteria)

    @by_distribution
    @pytest.mark.parametrize('granularity', ['kernel', 'filter', 'row'])
    def test_groups(self, new_learner, context, granularity):
        learn, cb = new_learner(tiny_net()), SparsifyCallback(.6, granularity, context)
        learn.fit_one_cycle(2, 1e-2, cbs=cb)
        assert len(cb.sparsifier.pools) == len(cb.sparsifier.layers) > 1
        n = sum(p.n_groups for p in cb.sparsifier.pools)
        if context != 'multiply_adds': assert sum(p.count() for p in cb.sparsifier.pools) == round(.6*n)
        else:
            costs = positions(learn.model)
            prices = {k: costs[k]*m.weight.numel()/cb.sparsifier.pruned[k].numel()
                for k, m in cb.sparsifier.layers.items()}
            total = sum(prices[k]*cb.sparsifier.pruned[k].numel() for k in prices)
            spent = sum(prices[k]*int(cb.sparsifier.pruned[k].sum()) for k in prices)
            assert .6*total - max(prices.values()) <= spent <= .6*total*(1 + 1e-9)
        for p in cb.sparsifier.pools: assert 0 <= p.count() < p.n_groups

    @by_distribution
    @pytest.mark.parametrize('schedule', ['iterative', 'dsd', 'one_shot'])
    def test_schedules(self, new_learner, context, schedule):
        "Weights return where a schedule falls, and the counts stay exact"
        learn, cb = new_learner(tiny_net()), SparsifyCallback(.8, context=context, schedule=schedule)
        probe = Probe(lambda net: {n: int((m.weight == 0).sum()) for n, m in layers_of(net).items()})
        learn.fit_one_cycle(2, 1e-2, cbs=[cb, probe])
        expected = expected_sparsities(schedule, .8, 2)
        if context != 'multiply_adds':
            n = sum(p.n_groups for p in cb.sparsifier.pools)
            assert learn.recorder.sparsities == pytest.approx([round(s*n)/n for s in expected], abs=1/n)
        else:
            costs, layers = positions(learn.model), layers_of(learn.model)
            total = sum(costs[n]*m.weight.numel() for n, m in layers.items())
            found = [sum(costs[n]*o for n, o in counts.items()) for counts in probe.seen]
            # Where the schedule falls, the layers give back in proportion, and each count is rounded.
            assert found == pytest.approx([s*total for s in expected], abs=len(layers)*max(costs.values()))

    @by_distribution
    def test_fine_tune(self, new_learner, context):
        "What is pruned in the first part stays pruned in the second"
        learn = new_learner(tiny_net(), splitter=lambda m: [list(m.parameters())[:2], list(m.parameters())[2:]])
        learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=SparsifyCallback(.7, context=context))
        zeros = {n: m.weight == 0 for n, m in layers_of(learn.model).items()}
        assert sum(int(o.sum()) for o in zeros.values()) > .3*sum(o.numel() for o in zeros.values())
        learn.fit_one_cycle(1, 1e-2, cbs=SparsifyCallback(.8, context=context))
        assert all((zeros[n] <= (m.weight == 0)).all() for n, m in layers_of(learn.model).items())

    @by_distribution
    def test_entries(self, new_learner, context):
        "Each entry of a dictionary has its own budget; other layers stay dense"
        net = tiny_net()
        first, *others = layers_of(net)
        learn = new_learner(net)
        convs = [n for n, m in layers_of(net).items() if isinstance(m, nn.Conv2d) and n != first]
        learn.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback({nn.Conv2d: .8, first: .3}, context=context))
        layers = layers_of(net)
        if context != 'multiply_adds':
            assert int((layers[first].weight == 0).sum()) == round(.3*layers[first].weight.numel())
            n = sum(layers[o].weight.numel() for o in convs)
            assert sum(int((layers[o].weight == 0).sum()) for o in convs) == round(.8*n)
        else: # each entry has one layer
            for o, share in {first: .3, **dict.fromkeys(convs, .8)}.items():
                assert int((layers[o].weight == 0).sum()) == int(share*layers[o].weight.numel() + 1e-9)
        assert all(layers[o].weight.all() for o in others if o not in convs)

    @by_distribution
    @pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
    def test_precisions(self, context, dtype):
        net = tiny_net().to(dtype)
        Sparsifier(net, context=context, inputs=tiny_images().to(dtype)).prune(.6)
        counts = {n: int((m.weight == 0).sum()) for n, m in layers_of(net).items()}
        costs = positions(net) if context == 'multiply_adds' else dict.fromkeys(counts, 1)
        total = sum(costs[n]*m.weight.numel() for n, m in layers_of(net).items())
        assert sum(costs[n]*o for n, o in counts.items()) == pytest.approx(.6*total, abs=max(costs.values()))

    def test_left_alone(self):
        "A layer without a gradient keeps what it has, and the others take its part"
        net = tiny_net()
        layers = layers_of(net)
        first = next(iter(layers))
        sp = Sparsifier(net, context='lamp', criteria='taylor')
        for n, m in layers.items():
            if n != first: m.weight.grad = torch.randn_like(m.weight)
        with pytest.warns(UserWarning, match='had no gradient'): sp.prune(.5)
        assert layers[first].weight.all()
        total = sum(m.weight.numel() for m in layers.values())
        assert sum(int((m.weight == 0).sum()) for m in layers.values()) == round(.5*total)


def positions(net):
    "In how many multiply-adds of one sample a weight takes part, by torch's counter"
    x = tiny_images().to(next(net.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter: net(x)
    counts = counter.get_flop_counts()
    def _flops(n): return sum(counts[f'{type(net).__name__}.{n}'].values())
    return {n: _flops(n)/2/m.weight.numel()/len(x) for n, m in layers_of(net).items()}


class TestContext:
    @pytest.mark.parametrize('word,right', [('flops', "'multiply_adds'"), ('ERK', "'erk'"), ('layerwise', "'local'"),
        ('latency', 'ByCost'), ('lamb', "'lamp'"), ('unifrom', "'uniform'")])
    def test_hints(self, word, right):
        with pytest.raises(ValueError, match=right): get_context(word, get_granularity('weight'))

    @by_distribution
    @pytest.mark.parametrize('granularity', ['2:4', 'structured', 'head', 'layer'])
    def test_refused(self, context, granularity):
        with pytest.raises(ValueError, match='global'): SparsifyCallback(granularity=granularity, context=context,
            sparsity=None if granularity == '2:4' else .5)

    def test_uniform(self):
        nets = [tiny_net(), tiny_net()]
        for net, context in zip(nets, ['local', 'uniform']): Sparsifier(net, context=context).prune(.7)
        assert_same(bits(nets[0]), bits(nets[1]))

    @by_distribution
    def test_repr(self, context): assert context.split('_')[0] in repr(SparsifyCallback(.5, context=context)).lower()


class TestMilliseconds:
    def test_measured(self):
        "Each layer has a cost, and a budget of milliseconds is kept"
        net, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64)
        before = bits(net)
        costs = milliseconds(net, x)
        assert_same(bits(net), before)
        assert list(costs) == [*layers_of(net)] and all(o >= 0 for o in costs.values()) and any(costs.values())
        Sparsifier(net, context=ByCost(costs)).prune(.8)
        def _total(count): return sum(costs[n]*count(m.weight) for n, m in layers_of(net).items())
        assert _total(torch.count_nonzero) == pytest.approx(.2*_total(torch.numel), rel=.01)

    def test_wrong(self):
        with pytest.raises(ValueError, match='fraction from .3 to 1'): milliseconds(tiny_net(), tiny_images(), .1)
