"Criteria give the scores, and the masks, that are worked out by hand."
import copy, pickle, re

import pytest, torch
from torch import nn, tensor

import onecycle_prune.all
from helpers import assert_same, bits, zeros
from networks import fill, line
from onecycle_prune.criteria import Criteria, Variety, criteria, criteria_aliases, get_criteria, needs_gradient
from onecycle_prune.sparsifier import Sparsifier

now, start = [.5, -2., 0., -1.], [-1., 1.5, .25, -1.]
by_hand = dict(
    large_final=[.5, 2, 0, 1],
    small_final=[-.5, -2, 0, -1],
    squared_final=[.25, 4, 0, 1],
    large_init=[1, 1.5, .25, 1],
    small_init=[-1, -1.5, -.25, -1],
    large_init_large_final=[.5, 1.5, 0, 1],    # the smaller of the two magnitudes
    small_init_small_final=[-1, -2, -.25, -1], # minus the larger of the two magnitudes
    magnitude_increase=[-.5, .5, -.25, 0],     # of magnitudes: -1 → .5 shrinks
    magnitude_change=[.5, .5, .25, 0],
    movmag=[.75, 7, 0, 0],                     # magnitude times distance
    movement=[1.5, 3.5, .25, 0],               # the distance from -1 to .5, through zero
    updating_movement=[1.5, 3.5, .25, 0],
    updating_movmag=[.75, 7, 0, 0],
    updating_magnitude_increase=[-.5, .5, -.25, 0])
of_start = ['large_init_large_final', 'small_init_small_final', 'magnitude_increase', 'magnitude_change', 'movement',
            'movmag']
of_last = ['updating_movement', 'updating_movmag', 'updating_magnitude_increase']
memories = dict.fromkeys(of_start, 'start') | dict.fromkeys(of_last, 'last')
of_init = ['large_init', 'small_init']  # their memory is the score
at_init = ['snip', 'grasp', 'synflow', 'wanda']  # tested in test_at_init


@pytest.mark.parametrize('name', by_hand)
def test_scores(name):
    m, criterion = line(*now), get_criteria(name)
    args = [criterion.remember(tensor([start]))] if name in {*memories, *of_init} else []
    assert torch.equal(criterion(m, *args), tensor([by_hand[name]]))
    assert m.weight.tolist() == [now]


@pytest.mark.parametrize('name', sorted({*criteria} - {'random', *of_init, *at_init, *criteria_aliases}))
def test_memory(name): assert getattr(criteria[name], 'memory', None) == memories.get(name)


def test_all_named(): assert set(criteria) == {*by_hand, *at_init, 'random', 'taylor', *criteria_aliases}


@pytest.mark.parametrize('alias,name', [
    ('magnitude', 'large_final'), ('l1', 'large_final'), ('l2', 'squared_final'), ('mov_large_final', 'movmag')])
def test_aliases(alias, name):
    "A second name gives the very same criterion"
    assert alias in criteria_aliases and criteria[alias] is get_criteria(alias) is criteria[name]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_square_of_half_precision(dtype):
    "300² is more than float16 holds, and 1e-4² is less"
    m = line(300., 1e-4).to(dtype)
    scores = get_criteria('squared_final')(m)
    assert scores.dtype == torch.float32 and scores.tolist() == [[float(w)**2 for w in m.weight[0]]]


def test_taylor():
    m = line(*now)
    # d/dw of the sum of both outputs is the sum of both inputs: 4, 1, 9, -3
    m(tensor([[1., 2., 4., 0.], [3., -1., 5., -3.]])).sum().backward()
    assert torch.equal(criteria['taylor'](m), tensor([[2., 2., 0., 3.]]))


def test_taylor_prunes():
    m = line(3., 2., -1., 4.)
    sp = Sparsifier(m, criteria='taylor')
    m(tensor([[1., -1., 5., .1]])).sum().backward()
    sp.prune(.5)  # 3, 2, 5, .4: by magnitude, the third would be pruned
    assert zeros(m) == [False, True, False, True]


def test_taylor_without_gradient():
    m = line(*now)
    with pytest.raises(ValueError, match='taylor.*no gradient.*backward'): Sparsifier(m, criteria='taylor').prune(.5)
    assert m.weight.tolist() == [now]


# Between `before` and `after`, each criterion ranks the weights in its own way:
#   |w₀|         .4 .1  3  2     smallest: 1, 0
#   |w|           2 .3 .2  1     smallest: 2, 1
#   min          .4 .1 .2  1     smallest: 1, 2
#   |w| - |w₀|  1.6 .2 -2.8 -1   smallest: 2, 3
#   |w - w₀|    2.4 .2 2.8  3    smallest: 1, 0
before, after = [.4, .1, 3., -2.], [-2., .3, .2, 1.]


@pytest.mark.parametrize('name,order', [
    ('large_init', [1, 0]), ('large_final', [2, 1]), ('large_init_large_final', [1, 2]),
    ('magnitude_increase', [2, 3]), ('movement', [1, 0]), ('small_final', [0, 3])])
def test_prunes(name, order):
    for n in (1, 2):
        m = line(*before)
        sp = Sparsifier(m, criteria=name)
        fill(m, after)
        sp.prune(n/4)
        assert zeros(m) == [i in order[:n] for i in range(4)]


@pytest.mark.parametrize('name,pruned', [('movement', [3, 0]), ('updating_movement', [3, 2])])
def test_start_and_last(name, pruned):
    "`movement` measures from the start, `updating_movement` from the last pruning"
    m = line(1., 1., 1., 1.)
    sp = Sparsifier(m, criteria=name)
    fill(m, [2., 3., 6., 1.])
    sp.prune(.25)              # moved by 1, 2, 5, 0: the last is pruned
    fill(m, [2.5, 4., 6.1, 0.])
    sp.prune(.5)               # since the start 1.5, 3, 5.1; since the last pruning .5, 1, .1
    assert zeros(m) == [i in pruned for i in range(4)]


def test_last_without_change():
    "A call of `prune` that prunes nothing more counts as the last pruning too"
    m = line(1., 1., 1., 1.)
    sp = Sparsifier(m, criteria='updating_movement')
    sp.prune(0)
    fill(m, [1.1, 9., 9., 9.])
    sp.prune(0)
    fill(m, [2., 9., 9.5, 10.])
    sp.prune(.25)              # .9, 0, .5, 1
    assert zeros(m) == [False, True, False, False]


def test_memory_is_a_copy():
    "The memory of each layer is a copy, which later changes of the weights do not reach"
    net = nn.Sequential(line(1., 2.), line(2., 1.))
    sp = Sparsifier(net, criteria='large_init')
    for m in net: m.weight.data.mul_(tensor([-5., 3.]))
    sp.prune(.5)
    assert [zeros(m) for m in net] == [[True, False], [False, True]]


def test_plain_function():
    def left_first(m): return torch.arange(m.weight.numel()).view_as(m.weight).float()
    m = line(4., 3., 2., 1.)
    Sparsifier(m, criteria=left_first).prune(.5)
    assert zeros(m) == [True, True, False, False]


@pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16, torch.float64])
def test_score_types(dtype):
    "Scores may be integers, bools and any floats"
    m = line(4., 3., 2., 1.)
    Sparsifier(m, criteria=lambda m: tensor([[1, 0, 1, 0]], dtype=dtype)).prune(.5)
    assert zeros(m) == [False, True, False, True]


def test_user_criteria():
    m = line(1., 1., 1.)
    sp = Sparsifier(m, criteria=Criteria(lambda w, start: w - start))
    fill(m, [0.5, 3., -4.])
    sp.prune(1/3)
    assert zeros(m) == [False, False, True]


def shrinkage(w, start): return start - w

shrunk = Criteria(shrinkage, memory='last')  # its name differs from that of the function


@pytest.mark.parametrize('c', [*criteria.values(), shrunk], ids=[*criteria, 'shrunk'])
@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
                         ids=['copy', 'deepcopy', 'pickle'])
def test_copies(c, copied):
    again, m = copied(c), line(*now)
    m.weight.grad = tensor([[1., 2., 3., 4.]])
    args = [tensor([start])] if hasattr(c, 'memory') else []
    assert getattr(again, 'memory', None) == getattr(c, 'memory', None)
    torch.manual_seed(0)
    expected = c(m, *args)
    torch.manual_seed(0)
    assert torch.equal(again(m, *args), expected)


def test_random():
    "One number for each weight, from torch's own generator, whose state is the same afterwards"
    m = line(*range(1000))
    torch.manual_seed(3)
    a = Sparsifier(m, criteria='random').state_dict()['memory']['']
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1, 1000), a)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), expected)
    b = Sparsifier(m, criteria='random').state_dict()['memory']['']
    assert a.shape == (1, 1000) and not torch.equal(a, b)


def test_random_prunes():
    "Half of a thousand weights, of both halves alike, whatever their magnitudes"
    m = line(*range(1, 1001))
    torch.manual_seed(0)
    Sparsifier(m, criteria='random').prune(.5)
    assert sum(zeros(m)) == 500 and 200 < sum(zeros(m)[:500]) < 300  # the standard deviation is 8


def test_random_hides_nothing():
    "`random` stays Python's module, which fastai exports under that name"
    assert 'random' not in vars(onecycle_prune.all) and 'movement' in vars(onecycle_prune.all)


@pytest.mark.parametrize('name,right', [
    ('large_finale', 'large_final'), ('Movement', 'movement'), ('tailor', 'taylor'), ('Magnitude', 'magnitude'),
    ('largeinit', 'large_init')])
def test_nearest(name, right):
    with pytest.raises(ValueError, match=f"Unknown criterion: '{name}'.*Did you mean '{right}'.*small_final.*l1"):
        get_criteria(name)


@pytest.mark.parametrize('word,right', [
    ('abs', "'magnitude'"), ('l1_norm', "'magnitude'"), ('magnitude_pruning', "'magnitude'"),
    ('l2_norm', "'l2'"), ('sensitivity', "'snip'"),
    ('initial_magnitude', "'large_init'"), ('small', "'large_final' (keeps the large weights), or 'small_final'"),
    ('largest', "'large_final' (keeps the large weights), or 'small_final'")])
def test_hints(word, right):
    "A word of another library is answered with the same criterion"
    with pytest.raises(ValueError, match=f'Did you mean {re.escape(right)}.*Allowed: large_final'): get_criteria(word)


# Words for which there is no criterion by name. The hint is a function; here are its scores of `now`, of which
# `start` is the memory and 1, 2, 3, 4 the gradient.
in_code = dict(grad=[1, 2, 3, 4], gradient_magnitude=[1, 2, 3, 4], magnitude_decrease=[.5, -.5, .25, 0])


@pytest.mark.parametrize('word', in_code)
def test_hints_in_code(word):
    "The function in a hint computes what the word means"
    with pytest.raises(ValueError, match='Did you mean ') as e: get_criteria(word)
    hint = re.search(r"Did you mean (.*?)(, or 'taylor' .*)?\? Allowed", str(e.value))[1]
    m, f = line(*now), get_criteria(eval(hint, dict(Criteria=Criteria, torch=torch, needs_gradient=needs_gradient)))
    m.weight.grad = tensor([[1., 2., 3., 4.]])
    assert getattr(f, 'memory', None) == ('start' if isinstance(f, Criteria) else None)
    assert f(m, *[tensor([start])] if isinstance(f, Criteria) else []).tolist() == [in_code[word]]


@pytest.mark.parametrize('word', [
    'weight', 'saliency', 'hessian', 'fisher', 'l0'])
def test_no_hint(word):
    "A word that no criterion here means has no hint"
    with pytest.raises(ValueError, match='^((?!Did you mean).)*$'): get_criteria(word)


def test_movement_pruning():
    "Movement pruning is not `movement`, and the hint says so"
    with pytest.raises(ValueError, match='of your own.*movement.*is .w - w₀.'): get_criteria('movement_pruning')


def test_class():
    "A class is not a criterion, and its instance is"
    with pytest.raises(ValueError, match='Did you mean an instance, such as Criteria.*Allowed: large_final'):
        get_criteria(Criteria)
    with pytest.raises(ValueError, match='Unknown criterion: .*Linear.*Allowed: large_final'): get_criteria(nn.Linear)


@pytest.mark.parametrize('criterion,shown', [
    (criteria['movement'], "Criteria(movement, memory='start')"), (shrunk, "Criteria(shrinkage, memory='last')"),
    (criteria['random'], "Criteria(random, memory='_random_numbers')")])
def test_repr(criterion, shown): assert repr(criterion) == shown


@pytest.mark.parametrize('c', ['', 'qqq', None, 3, tensor([1.])])
def test_unknown(c):
    with pytest.raises(ValueError, match='Unknown criterion: .*large_final.*function'): get_criteria(c)


def test_unknown_memory():
    with pytest.raises(ValueError, match="memory: 'strat'.*Did you mean 'start'"): Criteria(shrinkage, memory='strat')


def spoil(w, value):
    w = w.clone()
    w[0, 1] = value
    return w

wrong = dict(
    nan=lambda w: spoil(w, torch.nan), inf=lambda w: spoil(w, torch.inf), minus_inf=lambda w: spoil(w, -torch.inf),
    transposed=lambda w: w.T, flat=lambda w: w.flatten(), reduced=lambda w: w.mean(1), number=lambda w: 1.,
    none=lambda w: None, numpy=lambda w: w.numpy())


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('scores', wrong.values(), ids=wrong)
def test_wrong_scores(scores, context):
    "Scores that cannot be ranked raise an error with the name of the layer, before any weight changes"
    net = nn.ModuleDict(dict(fine=nn.Linear(3, 2), odd=nn.Linear(3, 2)))
    sp = Sparsifier(net, context=context, criteria=lambda m: (scores if m is net.odd else abs)(m.weight.detach()))
    w0 = bits(net)
    with pytest.raises(ValueError, match="layer 'odd'"): sp.prune(.5)
    assert_same(net.state_dict(), w0)
    assert all(mask.all() for mask in sp.masks.values())


class TestVariety:
    "Filters that repeat others are pruned first"
    def scores(self, weights, criterion='large_final', *memory):
        m = fill(nn.Linear(len(weights[0]), len(weights), bias=False), weights)
        found = Variety(criterion)(m, *memory)
        assert found.shape == m.weight.shape and (found == found[:, :1]).all()
        return found[:, 0]

    def test_by_hand(self):
        "Each filter's score times one minus the cosine to the nearest of the higher ones"
        found = self.scores([[2, 0], [1, 1], [0, 1.5], [-.5, 0]])
        c = 2**-.5
        torch.testing.assert_close(found, tensor([1*2, 1*(1-c), .75*(1-c), .25*1]))

    def test_copies(self):
        "Of equal filters only the first keeps a score, however large they are"
        found = self.scores([[3, 3], [3, 3], [.1, -.1], [3, 3]])
        assert found[0] > 0 and found[2] > 0 and found[1] == found[3] == 0

    @pytest.mark.parametrize('weights', [[[0, 0], [0, 0]], [[1, 2]], [[0, 0], [1, 1], [0, 0]]], ids=str)
    def test_finite(self, weights):
        found = self.scores(weights)
        assert found.isfinite().all() and (found >= 0).all()

    def test_negative_scores(self):
        "The order of the criterion is kept for filters that are equally far from each other"
        found = self.scores([[3, 0, 0], [0, 2, 0], [0, 0, 1]], 'small_final')
        assert found[0] < found[1] < found[2]

    def test_convolutions(self):
        "Filters of transposed convolutions are along the second axis"
        conv, transposed = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3)
        with torch.no_grad(): transposed.weight.copy_(conv.weight.transpose(0, 1))
        torch.testing.assert_close(Variety()(transposed).transpose(0, 1), Variety()(conv))

    def test_groups(self):
        "The filters of all groups are compared with each other, also where they are along the second axis"
        conv, transposed = nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2)
        def swap(t): return t.view(2, 2, 3, 3, 3).transpose(1, 2).reshape(6, 2, 3, 3)
        with torch.no_grad(): transposed.weight.copy_(swap(conv.weight))
        torch.testing.assert_close(Variety()(transposed), swap(Variety()(conv)))

    @pytest.mark.parametrize('criterion', [
        'movement', 'updating_movement', 'taylor', 'random', lambda m: m.weight.abs()])
    def test_appended(self, criterion):
        "It has the memory of its criterion, and needs a gradient as it does"
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        sp = Sparsifier(net, 'filter', criteria=Variety(criterion))
        net(torch.randn(2, 3, 8, 8)).sum().backward()
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn_like(p))
        sp.prune(.5)
        assert [int(m.weight.flatten(1).any(1).sum()) for m in net] == [4, 4]

    def test_prunes_copies_first(self):
        "In a pruning by steps one of each kind stays"
        torch.manual_seed(0)
        net = nn.Conv2d(3, 12, 3)
        with torch.no_grad(): net.weight[4:] = net.weight[:4].repeat(2, 1, 1, 1)*torch.rand(8, 1, 1, 1).add(1)
        kinds = torch.arange(12) % 4
        sp = Sparsifier(net, 'filter', criteria=Variety())
        for s in (1/6, 1/3, 1/2, 2/3): sp.prune(s)
        kept = net.weight.flatten(1).any(1)
        assert kinds[kept].sort().values.tolist() == [0, 1, 2, 3]

    def test_saved(self):
        c = pickle.loads(pickle.dumps(Variety('movement')))
        assert repr(c) == "Variety('movement')" and c.memory == 'start'

    def test_unknown(self):
        with pytest.raises(ValueError, match="Did you mean 'movement'"): Variety('movment')
