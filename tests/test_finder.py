"`sparsity_find`: a learner is measured, and stays as it is"
import copy, random

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, MSELossFlat, accuracy, no_random
from fastai.callback.all import AMPMode, MixedPrecision
from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
from onecycle_prune.all import SparsifyCallback
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import assert_same, bits
from networks import silence, tiny_data, tiny_net
from reference import layers_of

few = dict(sparsities=(.3, .6, .8, .9, .97), layer_sparsities=(.5, .9), n_batches=2, bn_batches=2, show_plot=False)


@pytest.fixture
def trained(new_learner):
    "A function that makes a learner which has learned something"
    def _make(model=None, **kwargs):
        learn, items = new_learner(model, metrics=accuracy, **kwargs), list(zip(*tiny_data(240)))
        learn.dls = DataLoaders(DataLoader(items[:160], bs=16), DataLoader(items[160:], bs=16))
        learn.fit_one_cycle(8, 1e-1)
        return learn
    return _make


def everything(learn):
    "A copy of all that a search could change"
    return dict(model=bits(learn.model), modes=[m.training for m in learn.model.modules()],
        hooks=[list(m._forward_pre_hooks) + list(m._forward_hooks) for m in learn.model.modules()],
        opt=copy.deepcopy(learn.opt.state_dict()['state']), hypers=copy.deepcopy(learn.opt.hypers),
        python=random.getstate(), numpy=np.random.get_state()[1].tolist(), torch=torch.get_rng_state(),
        cbs=[(type(o), {k: v for k, v in vars(o).items() if isinstance(v, (int, float, str))}) for o in learn.cbs],
        attributes=sorted(vars(learn)), values=[list(o) for o in learn.recorder.values],
        requires_grad=[p.requires_grad for p in learn.model.parameters()],
        grads=[None if p.grad is None else p.grad.clone() for p in learn.model.parameters()])


def assert_unchanged(before, learn):
    after = everything(learn)
    for k in before:
        if k in ('model', 'opt', 'torch', 'grads'): assert_same(after[k], before[k])
        else: assert after[k] == before[k], k


class TestUnchanged:
    def test_learner(self, trained):
        "Weights, statistics, optimizer, random numbers, callbacks, modes and hooks are as before, bit for bit"
        learn = trained()
        before = everything(learn)
        learn.sparsity_find(**few)
        assert_unchanged(before, learn)

    @pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize('after', [0, 3, 9])
    def test_interrupted(self, trained, error, after):
        "Also if it is interrupted, in the forward pass of a copy"
        class Stops(nn.Module):
            n = None
            def forward(self, x):
                if Stops.n == 0: raise error
                if Stops.n is not None: Stops.n -= 1
                return x
        learn = trained(nn.Sequential(*tiny_net(), Stops()))
        before = everything(learn)
        Stops.n = after
        with pytest.raises(error): learn.sparsity_find(**few)
        Stops.n = None
        assert_unchanged(before, learn)

    def test_next_training(self, trained):
        "The next training is that of a learner that was not searched, bit for bit"
        learners = [trained(), trained()]
        learners[0].sparsity_find(**few)
        for learn in learners:
            torch.manual_seed(1)
            learn.fit_one_cycle(1, 1e-2, cbs=SparsifyCallback(.5, criteria='random'))
        assert_same(*(bits(o.model) for o in learners))

    def test_shuffled(self, trained):
        "A loader that shuffles gives the next batches in the same order"
        def _next(search):
            x, y = tiny_data()
            torch.manual_seed(3), random.seed(3), np.random.seed(3)
            items = list(zip(x, y))
            dls = DataLoaders(DataLoader(items[:36], bs=8, shuffle=True), DataLoader(items[36:], bs=8))
            learn = silence(Learner(dls, tiny_net(), nn.CrossEntropyLoss()))
            learn.fit(12, 1e-1)
            if search: learn.sparsity_find(**few)
            return [b[0] for b in dls.train]
        assert_same(_next(True), _next(False))


class TestFound:
    def test_curve(self, trained):
        "The curve is the loss of copies that are pruned by hand, on the whole validation set"
        learn = trained()
        found = learn.sparsity_find(**few | dict(n_batches=100, bn_batches=0))
        with torch.no_grad(), no_random():
            for s in (0, *few['sparsities']):
                net = copy.deepcopy(learn.model).eval()
                Sparsifier(net).prune(s)
                x, y = map(torch.stack, zip(*learn.dls.valid.dataset))
                row = found.curve.loc[s]
                assert row.valid_loss == pytest.approx(float(nn.functional.cross_entropy(net(x), y)), rel=1e-4)
                assert row.accuracy == pytest.approx(float((net(x).argmax(1) == y).float().mean()))
        x, y = map(torch.stack, zip(*learn.dls.valid.dataset))
        for n in layers_of(learn.model):
            net = copy.deepcopy(learn.model).eval()
            Sparsifier(net, context='local').prune({n: .9})
            assert found.layers.loc[n, .9] == pytest.approx(float(nn.functional.cross_entropy(net(x), y)), rel=1e-4)

    def test_suggestion(self, trained):
        "At the suggested sparsity, a quarter of what the network has learned is lost"
        learn = trained()
        found = learn.sparsity_find(**few)
        loss = found.curve.valid_loss
        highest = np.maximum.accumulate(loss.to_numpy())
        limit = loss[0] + (loss.max() - loss[0])/4
        assert np.interp(found.sparsity, loss.index, highest) <= limit + 1e-6
        assert np.interp(found.sparsity + .011, loss.index, highest) >= limit - 1e-6
        assert set(found.sensitive) == set(found.by_layer) == set(layers_of(learn.model))

    def test_by_layer(self, trained):
        "Layer by layer, the suggestion reaches the same sparsity, and a sensitive layer keeps more"
        learn = trained()
        found = learn.sparsity_find(**few)
        sizes = {n: m.weight.numel() for n, m in layers_of(learn.model).items()}
        reached = sum(s*sizes[n] for n, s in found.by_layer.items()) / sum(sizes.values())
        assert reached <= found.sparsity + .01
        assert reached >= min(found.sparsity, few['layer_sparsities'][-1]) - .02
        learn.fit_one_cycle(1, 1e-2, cbs=SparsifyCallback(found.by_layer))
        for n, m in layers_of(learn.model).items():
            assert int((m.weight == 0).sum()) == min(round(found.by_layer[n]*sizes[n]), sizes[n]-1)

    def test_training(self, trained):
        learn = trained()
        found = learn.sparsity_find(**few)
        learn.fit_one_cycle(4, 1e-2, cbs=SparsifyCallback(found.sparsity))
        total = sum(m.weight.numel() for m in layers_of(learn.model).values())
        assert sum(int((m.weight == 0).sum()) for m in layers_of(learn.model).values()) == round(found.sparsity*total)

    @pytest.mark.parametrize('how', [
        dict(granularity='filter'), dict(granularity='structured'), dict(granularity='kernel', layers=nn.Conv2d),
        dict(context='erk'), dict(context='lamp'), dict(context='multiply_adds'), dict(context='local'),
        dict(criteria=lambda m: m.weight.square()), dict(layers=['0', '3'])],
        ids=['filter', 'structured', 'kernel', 'erk', 'lamp', 'multiply_adds', 'local', 'function', 'layers'])
    def test_settings(self, trained, how):
        "Any setting of the callback that can be measured without a training"
        found = trained().sparsity_find(**few | how)
        assert 0 <= found.sparsity < 1 and len(found.by_layer) == len(found.layers) > 0

    def test_whole_only(self, trained):
        found = trained().sparsity_find(**few | dict(layer_sparsities=None))
        assert not found.by_layer and not found.sensitive and found.layers.empty

    def test_plot(self, trained):
        found = trained().sparsity_find(**few)
        left, right = found.plot()
        assert left.lines[0].get_ydata().tolist() == found.curve.valid_loss.tolist()
        assert [o.get_text() for o in right.get_yticklabels()] == list(found.layers.index)


class TestLearners:
    "Learners of vision, tables and text, and with callbacks"
    def test_callbacks(self, trained):
        "A callback that changes inputs is used; one that only reports is not called"
        calls = []
        class Halves(Callback):
            def before_batch(self): self.learn.xb = (self.x/2,)
        class Reports(Callback):
            def after_batch(self): calls.append(self.training)
            def before_fit(self): calls.append('fit')
        learn = trained()
        learn.add_cbs([Halves(), Reports()])
        halved = learn.sparsity_find(**few)
        assert not calls
        learn.remove_cb(Halves)
        usual = learn.sparsity_find(**few)
        assert halved.curve.valid_loss.iloc[0] != usual.curve.valid_loss.iloc[0]

    def test_mixed_precision(self, trained):
        learn = trained(cbs=MixedPrecision(amp_mode=AMPMode.BF16))
        before = everything(learn)
        assert 0 <= learn.sparsity_find(**few).sparsity < 1
        assert_unchanged(before, learn)

    def test_regression(self, tmp_path):
        "A loss of another kind, and no metric"
        x, _ = tiny_data(480)
        items = list(zip(x, x.mean((1, 2, 3))[:, None]*10))
        dls = DataLoaders(DataLoader(items[:400], bs=16), DataLoader(items[400:], bs=16))
        net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 1))
        learn = silence(Learner(dls, net, MSELossFlat(), path=tmp_path))
        learn.fit_one_cycle(20, 1e-2)
        found = learn.sparsity_find(**few)
        assert list(found.curve.columns) == ['valid_loss'] and 0 < found.sparsity < 1

    def test_tabular(self, tmp_path):
        rng = np.random.default_rng(0)
        df = pd.DataFrame(dict(a=rng.choice(list('xyz'), 200), b=rng.normal(size=200), c=rng.normal(size=200)))
        df['y'] = ((df.a == 'x') ^ (df.b > 0)).astype(str)
        dls = TabularDataLoaders.from_df(df, path=tmp_path, procs=[Categorify, Normalize], cat_names=['a'],
            cont_names=['b', 'c'], y_names='y', y_block=CategoryBlock(), valid_idx=list(range(50)), bs=16)
        learn = silence(tabular_learner(dls, layers=[32, 16], metrics=accuracy))
        learn.fit_one_cycle(12, 1e-2)
        before = everything(learn)
        found = learn.sparsity_find(**few)
        assert_unchanged(before, learn)
        assert found.curve.accuracy.iloc[0] > .7 and 0 < found.sparsity < 1

    @pytest.mark.slow
    def test_text(self, tmp_path):
        "A text classifier, with the callbacks that its recurrent network needs"
        rng = np.random.default_rng(0)
        words = 'one two three four five six'.split()
        texts = [' '.join(rng.choice(words, rng.integers(4, 12))) for _ in range(120)]
        df = pd.DataFrame(dict(text=texts, label=[str(t.split()[-1] in words[:3]) for t in texts]))
        dls = TextDataLoaders.from_df(df, path=tmp_path, text_col='text', label_col='label', valid_pct=.3, bs=16,
            seed=0)
        config = awd_lstm_clas_config | dict(emb_sz=16, n_hid=24, n_layers=1)
        learn = silence(text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, metrics=accuracy))
        learn.fit_one_cycle(12, 5e-2)
        before = everything(learn)
        found = learn.sparsity_find(**few)
        assert_unchanged(before, learn)
        assert 0 <= found.sparsity < 1 and any('rnn' in n for n in found.by_layer)

    def test_sorted_validation(self, new_learner):
        "Items are taken from all parts of the validation set, which may be sorted by class"
        x, y = tiny_data(400)
        order = y[40:].argsort(stable=True)
        items = list(zip(x[:40], y[:40])), list(zip(x[40:][order], y[40:][order]))
        dls = DataLoaders(DataLoader(items[0], bs=8), DataLoader(items[1], bs=8))
        seen = set()
        class Notes(Callback):
            def before_batch(self): seen.update(self.yb[0].tolist())
        learn = silence(Learner(dls, tiny_net(), nn.CrossEntropyLoss()))
        learn.fit(15, 1e-1)
        learn.add_cb(Notes())
        learn.sparsity_find(**few)
        assert seen == {0, 1, 2, 3}


class TestErrors:
    def test_untrained(self, new_learner):
        class Zero(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)
            def forward(self, x): return 0*self.layer(x.mean((2, 3)))
        learn = new_learner(Zero())
        with pytest.raises(ValueError, match='learned too little'): learn.sparsity_find(**few)

    def test_no_validation(self, trained):
        learn = trained()
        learn.dls = DataLoaders(learn.dls.train, DataLoader([], bs=8))
        with pytest.raises(ValueError, match='no validation set'): learn.sparsity_find(**few)

    @pytest.mark.parametrize('how,message', [
        (dict(granularity='2:4'), 'implies a sparsity of 0.5'), (dict(criteria='movement'), "such as 'large_final'"),
        (dict(criteria='taylor'), "such as 'large_final'"), (dict(sparsities=(.9, .5)), 'rising numbers'),
        (dict(sparsities=()), 'rising numbers'), (dict(layer_sparsities=(0, .5)), 'rising numbers'),
        (dict(granularity='filtre'), "Did you mean 'filter'"), (dict(context='globel'), "Did you mean 'global'"),
        (dict(layers='9'), 'Unknown layer'), (dict(bn_batches=-1), 'bn_batches is a number'),
        (dict(n_batches=0), 'n_batches is a number of validation batches')])
    def test_arguments(self, trained, how, message):
        learn = trained()
        before = everything(learn)
        with pytest.raises(ValueError, match=message): learn.sparsity_find(**few | how)
        assert_unchanged(before, learn)
