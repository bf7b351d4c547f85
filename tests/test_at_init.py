"Scores before a training: the formulas of their papers, and what a training makes of them."
import copy, math, pickle
from functools import partial

import pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, params
from fastai.callback.mixup import MixUp
from onecycle_prune import at_init
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.criteria import AtInit, Drawn, Shuffled, Variety, criteria, get_criteria
from onecycle_prune.sparsifier import Sparsifier
from torch import nn, tensor
from torch.nn import functional as F

from helpers import assert_resumes, assert_same, bits, zeros
from networks import fill, line, momentum_sgd, tiny_data, tiny_learner, tiny_net, total_weights
from reference import layers_of

names = ['snip', 'grasp', 'synflow']
functions = [at_init.snip, at_init.grasp, at_init.synflow]


def tiny_batches(n=2):
    x, y = tiny_data(8*n)
    return list(zip(x.split(8), y.split(8)))


def smooth_net():
    "A network in float64 whose loss is smooth, with its batches"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    return net, [(x[:3], tensor([0, 1, 2])), (x[3:], tensor([2, 0, 1]))]


def loss_with(net, batches, weights, loss_func=F.cross_entropy, T=1.):
    "The loss of the batches, in sum, if the layers have these weights; without a change of the network"
    net = copy.deepcopy(net).train()
    with torch.no_grad():
        for n, w in weights.items(): net.get_submodule(n).weight.copy_(w)
    return sum(loss_func(net(x)/T, y) for x, y in batches)


def difference(f, w, i, eps):
    "The derivative of `f` by the number `i` of `w`, from two values of f"
    up, down = w.clone(), w.clone()
    up.view(-1)[i] += eps
    down.view(-1)[i] -= eps
    return (f(up) - f(down))/(2*eps)


class TestSnip:
    def test_finite_differences(self):
        net, batches = smooth_net()
        scores = at_init.snip(net, batches, F.cross_entropy)
        assert scores.keys() == {'0', '4'}
        for n, m in (('0', net[0]), ('4', net[4])):
            for i in range(m.weight.numel()):
                w = m.weight.detach()
                g = difference(lambda o, n=n: loss_with(net, batches, {n: o}), w, i, 1e-5)
                assert float(scores[n].view(-1)[i]) == pytest.approx(abs(float(w.view(-1)[i]*g)), rel=1e-5, abs=1e-9)

    def test_by_hand(self):
        "The loss of a linear layer, the sum of its outputs, has the sum of the inputs as its gradient"
        scores = at_init.snip(line(3., -2.), [(tensor([[1., 2.], [0., 2.]]), ())], lambda out: out.sum())
        assert scores[''].tolist() == [[3, 8]]


class TestGrasp:
    def test_finite_differences(self):
        "w·Hg is the derivative of the gradient's squared norm by w, times w/2"
        net, batches = smooth_net()
        T = 1.5
        start = {n: m.weight.detach() for n, m in layers_of(net).items()}
        def norm(weights):
            weights = {n: w.clone().requires_grad_() for n, w in weights.items()}
            module, state = copy.deepcopy(net).train(), {f'{n}.weight': w for n, w in weights.items()}
            loss = sum(F.cross_entropy(torch.func.functional_call(module, state, x)/T, y) for x, y in batches)
            return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(weights.values())))
        scores = at_init.grasp(net, batches, F.cross_entropy, temperature=T)
        for n, w in start.items():
            for i in range(0, w.numel(), 5):
                d = difference(lambda o, n=n: norm(start | {n: o}), w, i, 1e-5)
                assert float(scores[n].view(-1)[i]) == pytest.approx(float(w.view(-1)[i])*d/2, rel=1e-4, abs=1e-9)

    def test_keeps_the_highest(self):
        "Of the score w·Hg, as of any other, the lowest are pruned: the published highest -w·Hg"
        net = line(1., 2., 3.)
        x, y = tensor([[1., -1., 2.]]), tensor([[7.]])
        # 2(w·x - y)x = -4x, and H = 2xxᵀ, so Hg = -8(x·x)x, and w·Hg ∝ -w·x = -1, 2, -6
        sp = Sparsifier(net, criteria=AtInit(partial(at_init.grasp, temperature=1)))
        sp.prune_at_init(1/3, [(x, y)], F.mse_loss)
        assert zeros(net) == [False, False, True]

    def test_attention(self):
        "PyTorch's fused attention has no second derivative, so it is not used"
        torch.manual_seed(0)
        net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True)
        scores = at_init.grasp(net, [(torch.randn(2, 3, 8), torch.randn(2, 3, 8))], F.mse_loss, temperature=1)
        assert len(scores) == 4 and all(o.isfinite().all() and o.any() for o in scores.values())


class TestSynflow:
    def test_paths(self):
        "A weight has the share of the flow through all paths that it lies on"
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        fill(net[0], [1., -2., 3., 4.])
        fill(net[2], [-5., 6.])
        scores = at_init.synflow(net, [(torch.randn(3, 2), None)])
        flow = (1+2)*5 + (3+4)*6
        unit = float(scores['2'].sum())/flow
        assert (scores['0']/unit).tolist() == [[5, 10], [18, 24]]
        assert (scores['2']/unit).tolist() == [[15, 42]]

    def test_data_does_not_matter(self):
        x, y = tiny_data(8)
        scores = [at_init.synflow(tiny_net(), [(o, y)]) for o in (x, 1e3*x[:2])]
        assert_same(*scores)

    def test_conserved(self):
        "Each layer has the whole flow, if there are no biases"
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 2, bias=False), nn.Flatten(),
            nn.Linear(4, 3, bias=False))
        flows = [float(o.sum()) for o in at_init.synflow(net, [(torch.randn(2, 3, 4, 4), None)]).values()]
        assert flows == pytest.approx([flows[0]]*3) and flows[0] > 0

    def test_deep(self):
        "The flow through 300 layers is 4.8**300 and leaves the range of float32, and the scores do not"
        net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(300)))
        with torch.no_grad():
            for m in net: m.weight.fill_(.6)
        scores = at_init.synflow(net, [(torch.randn(1, 8), None)])
        highest = max(float(o.float().max()) for o in scores.values())
        assert math.isfinite(highest) and highest > 0 and all(o.float().gt(0).all() for o in scores.values())

    def test_no_collapse(self):
        "At 99.9 %, one round empties wide layers but for the group that each layer keeps, and 100 rounds do not"
        def left(rounds):
            torch.manual_seed(0)
            sizes = [20, 400, 400, 400, 10]
            net = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in zip(sizes, sizes[1:])))
            sp = Sparsifier(net, criteria=AtInit(at_init.synflow, rounds))
            sp.prune_at_init(.999, [(torch.randn(1, 20), None)])
            kept = [int(o.sum()) for o in sp.masks.values()]
            assert sum(kept) == sum(o.numel() for o in sp.masks.values()) - round(
                .999*sum(o.numel() for o in sp.masks.values()))
            with torch.no_grad(): return kept, float(net.double()(torch.ones(1, 20).double()).abs().sum())
        (once, _), (rounds, flow) = left(1), left(100)
        assert min(once) == 1 < min(rounds) and flow > 0


@pytest.mark.parametrize('score', functions, ids=names)
class TestFunctions:
    def test_model_unchanged(self, score):
        "Weights, statistics, gradients, modes, frozen weights and random numbers are as before"
        net = nn.Sequential(tiny_net(), nn.Dropout(.5)).eval()
        net[0][0].weight.requires_grad_(False)
        before, state = bits(net), torch.get_rng_state()
        scores = score(net, tiny_batches(), F.cross_entropy)
        assert_same(bits(net), before)
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m.training for m in net.modules()) and all(p.grad is None for p in net.parameters())
        assert not net[0][0].weight.requires_grad and net[0][3].weight.requires_grad
        assert {n: o.shape for n, o in scores.items()} == {n: m.weight.shape for n, m in layers_of(net).items()}
        assert scores['0.0'].any() and not any(o.requires_grad for o in scores.values())

    def test_learner(self, score, tmp_path):
        learn = tiny_learner(tmp_path)
        expected = score(learn.model, tiny_batches(), F.cross_entropy)
        assert_same(score(learn, tiny_batches(), F.cross_entropy), expected)

    def test_unused_layer(self, score):
        "A layer that the output does not depend on has scores of 0"
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)
            def forward(self, x): return self.a(x)
        scores = score(Part(), [(torch.randn(4, 3), tensor([0, 1, 0, 1]))], F.cross_entropy)
        assert not scores['b'].any() and scores['a'].any()


@pytest.mark.parametrize('name', names)
class TestTraining:
    def test_exact_and_fixed(self, name, tmp_path):
        "The network is pruned before the first step, exactly, and its masks do not change"
        seen = []
        def look(cb): seen.append([m.weight == 0 for m in layers_of(cb.model).values()])
        class See(Callback):
            order = SparsifyCallback.order + 1
            before_batch = after_batch = lambda self: look(self) if self.training else None
        learn = tiny_learner(tmp_path)
        learn.fit_one_cycle(2, 1e-2, cbs=[SparsifyCallback(.9, criteria=name, schedule='at_start'), See()])
        assert sum(int(o.sum()) for o in seen[0]) == round(.9*total_weights)
        for masks in seen[1:]: assert_same(masks, seen[0])
        assert len(seen) == 20

    def test_same_as_by_hand(self, name, tmp_path):
        "The masks are those of the first batch, by the function and a selection of the highest scores"
        learn = tiny_learner(tmp_path)
        batch = next(iter(learn.dls.train))
        score = functions[names.index(name)]
        net, rounds = tiny_net(), criteria[name].rounds
        for i in range(1, rounds+1):
            scores = {n: o.masked_fill(layers_of(net)[n].weight == 0, -math.inf)
                      for n, o in score(net, [batch], F.cross_entropy).items()}
            n_pruned = round((1 - .1**(i/rounds))*total_weights)
            lowest = torch.cat([o.flatten() for o in scores.values()]).argsort(stable=True)[:n_pruned]
            mask = torch.zeros(total_weights, dtype=torch.bool)
            mask[lowest] = True
            sizes = [m.weight.numel() for m in layers_of(net).values()]
            for m, part in zip(layers_of(net).values(), mask.split(sizes)): m.weight.data[part.view_as(m.weight)] = 0
        learn.fit(1, 1e-2, cbs=SparsifyCallback(.9, criteria=name, schedule='at_start'))
        for a, b in zip(layers_of(net).values(), layers_of(learn.model).values()):
            assert torch.equal(a.weight == 0, b.weight == 0)

    @pytest.mark.parametrize('schedule', ['at_start', 'one_cycle'])
    def test_resumes(self, name, schedule, tmp_path):
        assert_resumes(lambda: tiny_learner(tmp_path), criteria=name, schedule=schedule, sparsity=.8)

    def test_one_cycle(self, name, tmp_path):
        "With a schedule that rises, the order of the first batch is kept"
        learn = tiny_learner(tmp_path)
        scores = get_criteria(name).score(learn.model, [next(iter(learn.dls.train))], F.cross_entropy, None)
        learn.fit(2, 1e-2, cbs=SparsifyCallback(.7, context='local', criteria=name))
        for n, m in layers_of(learn.model).items():
            pruned = m.weight == 0
            assert pruned.sum() == round(.7*m.weight.numel())
            assert scores[n][pruned].max() <= scores[n][~pruned].min()

    def test_dict_and_pattern(self, name, tmp_path):
        learn = tiny_learner(tmp_path)
        learn.fit(1, 1e-2, cbs=SparsifyCallback({'0': .5, '3': .8}, criteria=name, schedule='at_start'))
        assert [int((m.weight == 0).sum()) for m in layers_of(learn.model).values()] == [144, round(.8*1152), 0]
        learn = tiny_learner(tmp_path)
        learn.fit(1, 1e-2, cbs=SparsifyCallback(None, '2:4', criteria=name, schedule='at_start'))
        runs = learn.model[8].weight.view(-1, 4)
        assert ((runs == 0).sum(1) == 2).all()

    def test_mixup(self, name, tmp_path):
        "The targets and the loss of the first batch are those of MixUp"
        learn = tiny_learner(tmp_path)
        learn.loss_func = CrossEntropyLossFlat()
        learn.fit(1, 1e-2, cbs=[MixUp(), SparsifyCallback(.9, criteria=name, schedule='at_start')])
        assert sum(int((m.weight == 0).sum()) for m in layers_of(learn.model).values()) == round(.9*total_weights)


@pytest.mark.parametrize('criteria', ['large_final', 'random', 'large_init'])
def test_at_start_without_scores(criteria, tmp_path):
    "Criteria that need no batch prune before the first step too"
    learn, counts = tiny_learner(tmp_path), []
    class See(Callback):
        order = SparsifyCallback.order + 1
        def before_batch(self):
            if self.training: counts.append(sum(int((m.weight == 0).sum()) for m in layers_of(self.model).values()))
    learn.fit(1, 1e-2, cbs=[SparsifyCallback(.9, context='erk', criteria=criteria, schedule='at_start'), See()])
    assert counts == [round(.9*total_weights)]*5


@pytest.mark.parametrize('criteria', ['movement', 'taylor', 'updating_movement'])
def test_at_start_after_a_step(criteria, tmp_path):
    "Criteria that say nothing before a step prune after the first one"
    learn, counts = tiny_learner(tmp_path), []
    class See(Callback):
        order = SparsifyCallback.order + 1
        def before_batch(self):
            if self.training: counts.append(sum(int((m.weight == 0).sum()) for m in layers_of(self.model).values()))
    learn.fit(1, 1e-2, cbs=[SparsifyCallback(.9, criteria=criteria, schedule='at_start'), See()])
    assert counts == [0] + [round(.9*total_weights)]*4


def pruned_masks(net, criterion, s=.8):
    "The masks after pruning before a training"
    sp = Sparsifier(net, criteria=criterion)
    sp.prune_at_init(s, tiny_batches(), F.cross_entropy)
    return sp.masks


class TestDrawn:
    def test_in_proportion(self):
        "Of two weights with scores 3 and 1, the first one stays in three of four draws"
        def score(model, batches, loss_func, weights): return {'': tensor([[3., 1.]])}
        kept = 0
        torch.manual_seed(0)
        for _ in range(2000):
            torch.rand(1)  # a draw leaves torch's generator as it was
            m = line(1., 1.)
            Sparsifier(m, criteria=Drawn(AtInit(score))).prune_at_init(.5, [], None)
            kept += not zeros(m)[0]
        assert kept/2000 == pytest.approx(.75, abs=.04)

    def test_exact(self):
        def score(model, batches, loss_func, weights): return {'': torch.arange(1., 1001).view(1, -1)}
        kept = pruned_masks(line(*[1.]*1000), Drawn(AtInit(score)), .5)[''].flatten()
        assert kept.sum() == 500
        # neither the best ones nor any ones: half of the weights by their scores would have a mean of 750
        assert 560 < float(torch.arange(1., 1001)[kept].mean()) < 700

    def test_zero_last(self):
        "A weight with the score 0 stays only if all others do"
        def score(model, batches, loss_func, weights): return {'': tensor([[0., 1e-30, 0., 1e30]])}
        m = line(1., 1., 1., 1.)
        Sparsifier(m, criteria=Drawn(AtInit(score))).prune_at_init(.5, [], None)
        assert zeros(m) == [True, False, True, False]

    def test_negative(self):
        with pytest.raises(ValueError, match="Drawn.'grasp'.: chances in proportion to negative scores"):
            pruned_masks(tiny_net(), Drawn('grasp'))


class TestShuffled:
    def test_same_counts(self):
        "Each layer loses as many weights, and other ones"
        net, other = tiny_net(), tiny_net()
        masks = pruned_masks(net, 'snip'), pruned_masks(other, Shuffled('snip'))
        for n in masks[0]:
            assert masks[0][n].sum() == masks[1][n].sum() and not torch.equal(masks[0][n], masks[1][n])


@pytest.mark.parametrize('kind', [Drawn, Shuffled])
class TestChanged:
    def test_random_numbers(self, kind, tmp_path):
        "The numbers depend on the seed, and the training has those of a training without it"
        def masks(seed):
            net = tiny_net()
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            found = pruned_masks(net, kind('snip'))
            assert torch.equal(torch.get_rng_state(), state)
            return found
        assert_same(masks(0), masks(0))
        assert not all(torch.equal(a, b) for a, b in zip(masks(0).values(), masks(1).values()))

    def test_resumes(self, kind, tmp_path):
        assert_resumes(lambda: tiny_learner(tmp_path), criteria=kind('snip'), schedule='at_start', sparsity=.8)

    def test_name_and_pickle(self, kind):
        c = pickle.loads(pickle.dumps(kind('synflow')))
        assert repr(c) == f"{kind.__name__}('synflow')" == c.__name__ and c.rounds == 100
        assert repr(c) in repr(SparsifyCallback(.9, criteria=c))

    def test_error(self, kind):
        allowed = 'Allowed: snip, grasp, synflow'
        with pytest.raises(ValueError, match=f"{kind.__name__} changes scores.*'movement'.*{allowed}"): kind('movement')
        with pytest.raises(ValueError, match="Did you mean 'snip'"): kind('snipp')


class TestWanda:
    def test_linear(self):
        "|w|·‖x‖ over all positions of all items, in the mean of the items"
        m = line(3., -2.)
        x = tensor([[[1., 0], [2, 2]], [[2, 1], [0, 2]]])  # 2 items of 2 positions: squares 1+4+4 and 4+1+4
        sp = Sparsifier(m, criteria='wanda')
        sp.score([(x[:1], None), (x[1:], None)], None)
        scores = sp.criteria(m, sp.memory[''])
        torch.testing.assert_close(scores, tensor([[3*(9/2)**.5, 2*(9/2)**.5]]))

    @pytest.mark.parametrize('m', [
        nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(4, 6, 2, groups=2), nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(4, 4, 3, groups=4), nn.Conv3d(4, 2, 1)], ids=repr)
    def test_convolutions(self, m):
        "The norm of an input channel, for each weight that reads it: by its effect on the output"
        x = torch.randn(3, 4, *[6]*(m.weight.ndim-2), generator=torch.Generator().manual_seed(0))
        norms = at_init.input_norms(m, [(x, None)])['']
        assert norms.shape == m.weight.shape
        for i in range(m.weight.numel()):
            one = torch.zeros(m.weight.numel()).index_fill_(0, tensor([i]), 1.)
            copied = fill(copy.deepcopy(m), one)
            copied.bias.data.zero_()
            alone = [copied(x * (torch.arange(4) == c).view(4, *[1]*(x.ndim-2))).any() for c in range(4)]
            expected = x[:, alone.index(True)].square().sum()/3
            assert sum(alone) == 1 and float(norms.view(-1)[i]) == pytest.approx(float(expected)**.5)

    def test_follows_the_weights(self, tmp_path):
        "The norms are of the first batch, and the weights of each step"
        learn = tiny_learner(tmp_path)
        x, _ = next(iter(learn.dls.train))
        norms = at_init.input_norms(learn.model, [(x, None)])
        at_end = dict(context='local', schedule=lambda pos: float(pos == 1))
        learn.fit(2, 1e-2, cbs=SparsifyCallback(.5, criteria='wanda', **at_end))
        fresh = tiny_learner(tmp_path)
        fresh.fit(2, 1e-2)
        for n, m in layers_of(fresh.model).items():
            lowest = (m.weight.abs()*norms[n]).flatten().argsort()[:m.weight.numel()//2]
            assert (layers_of(learn.model)[n].weight.flatten()[lowest] == 0).all()

    def test_trained_network(self):
        "Without any training: one call prunes a network by a few batches"
        net = tiny_net()
        sp = Sparsifier(net, context='local', criteria='wanda')
        sp.prune_at_init(.5, tiny_batches())
        norms = at_init.input_norms(tiny_net(), tiny_batches())
        for n, m in layers_of(tiny_net()).items():
            scores = m.weight.abs()*norms[n]
            assert scores[~sp.masks[n]].max() < scores[sp.masks[n]].min()

    def test_resumes(self, tmp_path):
        assert_resumes(lambda: tiny_learner(tmp_path), criteria='wanda', sparsity=.8)

    def test_other_layers(self):
        net = nn.LSTM(3, 4)
        with pytest.raises(ValueError, match='convolutions and linear layers. These are others: '):
            Sparsifier(net, criteria='wanda').prune_at_init(.5, [(torch.randn(2, 3, 3), None)])

    def test_pickle(self):
        c = pickle.loads(pickle.dumps(get_criteria('wanda')))
        assert repr(c) == 'Wanda()' and c.formula == '|w*o|' and c.rounds == 1


class TestErrors:
    def test_not_scored(self):
        net = tiny_net()
        sp = Sparsifier(net, criteria='snip')
        with pytest.raises(ValueError, match="'snip' scores a network before its training: call `prune_at_init`"):
            sp.prune(.5)
        assert not any((m.weight == 0).any() for m in layers_of(net).values())

    def test_nothing_to_score(self):
        with pytest.raises(ValueError, match="'movement' scores the weights as they are in each step"):
            Sparsifier(tiny_net(), criteria='movement').score([], None)

    def test_rounds(self):
        with pytest.raises(ValueError, match='rounds is 1 or more, got 0'): AtInit(at_init.snip, rounds=0)

    def test_nan(self):
        net = tiny_net()
        before = bits(net)
        with pytest.raises(ValueError, match="Scores of layer '0' are NaN or infinite"):
            batch = torch.full((2, 4, 6, 6), torch.nan), tensor([0, 1])
            Sparsifier(net, criteria='snip').prune_at_init(.5, [batch], F.cross_entropy)
        assert_same(bits(net), before)


def test_variety():
    "Filters that repeat others are pruned first, by scores of before the training too"
    def kept(criterion):
        net = tiny_net()
        with torch.no_grad():
            net[0].weight[1] = net[0].weight[0]  # filters that do the same
            net[0].bias[1] = net[0].bias[0]
            net[3].weight[:, 1] = net[3].weight[:, 0]
            net[3].weight[:, :2] *= 9  # and matter most
        sp = Sparsifier(net, 'filter', criteria=criterion, layers='0')
        sp.prune_at_init(.5, tiny_batches(), F.cross_entropy)
        return sp.masks['0'].flatten(1).any(1).tolist()
    assert kept('snip')[:2] == [True, True] and sorted(kept(Variety('snip'))[:2]) == [False, True]
    assert sum(kept(Variety('snip'))) == 4


def test_pickle():
    c = pickle.loads(pickle.dumps(get_criteria('synflow')))
    assert isinstance(c, AtInit) and c.rounds == 100 and c.score is at_init.synflow


def test_optimizer_of_learner(tmp_path):
    "Scoring happens before the first step, so the optimizer has no state yet, and no gradient is left"
    learn = tiny_learner(tmp_path, opt_func=momentum_sgd)
    class See(Callback):
        order = SparsifyCallback.order + 1
        def before_batch(self):
            if self.training and not self.iter and not self.epoch:
                assert all(p.grad is None for p in params(self.model))
    learn.fit(1, 1e-2, cbs=[SparsifyCallback(.9, criteria='grasp', schedule='at_start'), See()])
    assert learn.recorder.sparsities[0] == pytest.approx(.9, abs=1e-3)
