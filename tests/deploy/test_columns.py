"Inputs that a network does not read: which they are, by changing them, and a network without them"
import numpy as np, pandas as pd, pytest, torch
from fastai.tabular.all import (Categorify, CategoryBlock, Normalize, TabularDataLoaders, TabularModel, tabular_config,
    tabular_learner)
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.deploy.columns import drop_columns, unread_columns, unread_inputs
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits
from networks import silence

cat_names, cont_names = ['k', 'l', 'm'], ['x', 'y', 'z', 'u']


@pytest.fixture
def learner():
    "A function that makes a tabular learner with three categorical and four continuous columns"
    def _make(cat_names=cat_names, cont_names=cont_names, **config):
        torch.manual_seed(0)
        random = np.random.default_rng(0)
        df = pd.DataFrame({n: random.choice(list('pqrst'), 60) for n in ['k', 'l', 'm']}
            | {n: random.normal(size=60) for n in ['x', 'y', 'z', 'u']})
        df['heavy'] = (df.x + (df.k == 'p') > .3).astype(int)
        dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], y_names='heavy', y_block=CategoryBlock(),
            cat_names=list(cat_names), cont_names=list(cont_names), bs=12, seed=0)
        return silence(tabular_learner(dls, layers=[10, 6], config=tabular_config(**config)))
    return _make


def first_linear(model): return next(m for m in model.layers.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def zero_columns(learn, names):
    "Zero the weights of the first layer for these columns of the data"
    w, start = first_linear(learn.model).weight, 0
    for n, e in zip(learn.dls.cat_names, learn.model.embeds):
        if n in names: w[:, start:start+e.embedding_dim] = 0
        start += e.embedding_dim
    for i, n in enumerate(learn.dls.cont_names):
        if n in names: w[:, start+i] = 0


@torch.no_grad()
def matters(learn, name):
    "Whether another value of a column changes an output"
    model = learn.model.eval()
    x = [o.clone() for o in learn.dls.one_batch()[:2]]
    before = model(*x)
    tensor, names = (x[0], learn.dls.cat_names) if name in learn.dls.cat_names else (x[1], learn.dls.cont_names)
    column = tensor[:, names.index(name)]
    column.copy_((column + 1) % 5 if column.dtype == torch.long else column + 10)
    return not torch.equal(model(*x), before)


configs = [{}, dict(bn_cont=False), dict(lin_first=False), dict(use_bn=False), dict(embed_p=.1, ps=.1)]


class TestColumns:
    "Of a tabular learner"
    @pytest.mark.parametrize('config', configs, ids=str)
    @pytest.mark.parametrize('names', [[], ['l'], ['x', 'u'], ['k', 'm', 'y'], cat_names, cont_names], ids=str)
    def test_dropped(self, learner, names, config):
        "The names, and a network that computes the same from the other columns"
        learn = learner(**config)
        zero_columns(learn, names)
        before = bits(learn.model)
        assert unread_columns(learn) == names
        assert [n for n in cat_names + cont_names if not matters(learn, n)] == names
        model, cats, conts = drop_columns(learn)
        assert cats == [n for n in cat_names if n not in names] and conts == [n for n in cont_names if n not in names]
        x_cat, x_cont = learn.dls.one_batch()[:2]
        x = x_cat[:, [cat_names.index(n) for n in cats]], x_cont[:, [cont_names.index(n) for n in conts]]
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(*x), learn.model.eval()(x_cat, x_cont), rtol=1e-5, atol=1e-5)
        assert_same(bits(learn.model), before)

    def test_trains_on(self, learner):
        "The network without columns fits data loaders without them"
        learn = learner()
        zero_columns(learn, ['k', 'm', 'y'])
        model, cats, conts = drop_columns(learn)
        other = learner(cats, conts)
        other.model = model
        other.fit(1)
        assert first_linear(model).in_features == sum(e.embedding_dim for e in model.embeds) + len(conts)

    def test_only_some_features(self, learner):
        "A column of which one feature is read is read"
        learn = learner()
        with torch.no_grad(): first_linear(learn.model).weight[:, 1:3] = 0
        assert unread_columns(learn) == []

    def test_through_dead_units(self, learner):
        "A column that only units without an effect read has no effect"
        learn = learner()
        zero_columns(learn, ['x'])
        linear, after = (m for m in list(learn.model.layers.modules()) if isinstance(m, nn.Linear)
                         and m.out_features in (10, 6))
        with torch.no_grad():
            linear.weight[3, -4] = 1
            after.weight[:, 3] = 0
        assert unread_columns(learn) == ['x']

    def test_after_a_training(self, learner):
        "Columns of the first layer are pruned in a training, and those that remain are the right ones"
        learn = learner()
        first = first_linear(learn.model)
        learn.fit_one_cycle(20, 1e-1, cbs=SparsifyCallback(.7, 'column', layers=first))
        left = set(cat_names + cont_names) - set(unread_columns(learn))
        assert {n for n in cat_names + cont_names if matters(learn, n)} == left and 'x' in left
        drop_columns(learn)

    def test_none_would_remain(self, learner):
        learn = learner()
        zero_columns(learn, cat_names + cont_names)
        with pytest.raises(ValueError, match='No column would remain'): drop_columns(learn)

    def test_other_learner(self, new_learner):
        for f in (unread_columns, drop_columns):
            with pytest.raises(ValueError, match='TabularModel of|is a TabularModel'): f(new_learner())

    def test_random_state(self, learner):
        learn = learner()
        state = torch.get_rng_state()
        drop_columns(learn)
        assert torch.equal(torch.get_rng_state(), state)


class TestInputs:
    "Of any model"
    def test_image(self):
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
        with torch.no_grad(): net[0].weight[:, [0, 2]] = 0
        assert unread_inputs(net, torch.randn(2, 4, 8, 8)) == [[0, 2]]

    def test_pruned(self):
        "By granularity 'shared_kernel', which prunes what reads an input channel"
        net = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6*36, 2))
        Sparsifier(net, 'shared_kernel', layers='0').prune(.5)
        found, = unread_inputs(net, torch.randn(2, 8, 8, 8))
        assert found == net[0].weight.transpose(0, 1).flatten(1).eq(0).all(1).nonzero().flatten().tolist()
        assert len(found) == 4

    def test_shortcut(self):
        "An input that an output contains is read"
        class Shortcut(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 3)
            def forward(self, x): return x + self.linear(x)
        net = Shortcut()
        nn.init.zeros_(net.linear.weight)
        assert unread_inputs(net, torch.randn(2, 3)) == [[]]

    def test_two_inputs(self):
        net = TabularModel([(5, 3), (5, 3)], 2, 1, [8])
        with torch.no_grad(): net.layers[0][0].weight[:, :3] = 0
        assert unread_inputs(net, (torch.randint(5, (4, 2)), torch.randn(4, 2))) == [[0], []]

    def test_grouped(self):
        "Groups stay equal, so an input is read if any group reads its own at the same place"
        net = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
        with torch.no_grad(): net[0].weight[4:, 1] = 0
        assert unread_inputs(net, torch.randn(2, 4, 3, 3)) == [[]]
        with torch.no_grad(): net[0].weight[:, 1] = 0
        assert unread_inputs(net, torch.randn(2, 4, 3, 3)) == [[1, 3]]
