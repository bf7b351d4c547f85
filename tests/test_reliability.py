"""Situations that trainings get into, in which pruning has to work: each test is one, and its docstring names it.

With `--fasterai`, fasterai's callback is tested in the same situations. Its sparsity may be five points off."""
import copy, io, os, pickle, warnings
from functools import partial

import pandas as pd, pytest, torch
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
    CancelTrainException, DataLoader, DataLoaders, Learner, OptimWrapper, accuracy, load_learner, params)
from fastai.callback.all import (CSVLogger, CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp,
    SaveModelCallback, ShortEpochCallback, TerminateOnNaNCallback)
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, Lamb, Larc, Lookahead, QHAdam, RAdam, RMSProp, ranger
from onecycle_prune.criteria import criteria
from onecycle_prune.experiments.common import BFloat16
from torch import nn

from helpers import Probe, assert_same, before_training_batches, bits, run_python
from networks import adam, momentum_sgd, n_weights, tiny_data, tiny_net, total_weights
from reference import n_zeros, stay_zero, total_zeros, zero_masks

# The training of `networks.tiny_learner` in a new process, as the learner `learn`.
new_process = """
    from pathlib import Path
    from fastai.callback.all import *
    from helpers import *
    from networks import *
    learn = tiny_learner(Path({path!r}))
"""


class Break(Callback):
    "Raise `ex` at an event of a batch"
    def __init__(self, ex, epoch=1, batch=2, event='before_batch'):
        self.ex, self.position = ex, (epoch, batch)
        setattr(self, event, self.raise_here)
    def raise_here(self):
        if self.training and (self.epoch, self.iter) == self.position: raise self.ex


class Snapshot(Callback):
    "Pickle the learner with all its callbacks in the middle of a training"
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 2): self.pickled = pickle.dumps(self.learn)


@pytest.fixture
def at_target(tolerance):
    "A function that asserts that each of the named layers of a model has its sparsity"
    def _check(model, target=.9, names='038'):
        for n in names:
            assert abs(n_zeros(model)[n] - round(target*n_weights[n])) <= tolerance*n_weights[n], f'layer {n}'
    return _check


def note_masks(seen): return before_training_batches(lambda learn: seen.append(zero_masks(learn.model)))


class TestExactness:
    "Exactness"

    def test_exact(self, new_learner, prune):
        "Each layer ends with exactly its number of zeros"
        learn = new_learner()
        learn.fit_one_cycle(3, 1e-2, cbs=prune(.9))
        assert n_zeros(learn.model) == {n: round(.9*k) for n, k in n_weights.items()}

    def test_exact_global(self, new_learner, prune):
        "All layers in one pool end with exactly their number of zeros"
        learn = new_learner()
        learn.fit_one_cycle(3, 1e-2, cbs=prune(.9, context='global'))
        assert total_zeros(learn.model) == round(.9*total_weights)

    def test_ties(self, new_learner, prune, at_target):
        "All weights of a layer are equal"
        net = tiny_net()
        for n in n_weights: net[int(n)].weight.data.fill_(.5)
        learn = new_learner(net)
        learn.fit(2, 0., cbs=prune(.7))
        at_target(learn.model, .7)

    def test_nan(self, new_learner, prune):
        "Weights that become NaN raise an error that says so"
        learn = new_learner()
        def spoil(self): self.model[3].weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match='NaN'): learn.fit(3, 1e-2, cbs=[prune(.9), Callback(before_batch=spoil)])

    def test_nearly_all(self, new_learner, prune, tolerance):
        "99.9 % in one pool: each layer keeps a weight"
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=prune(.999, context='global'))
        zeros = n_zeros(learn.model)
        assert all(zeros[n] < k for n, k in n_weights.items())
        assert abs(sum(zeros.values()) - (total_weights-3)) <= tolerance*total_weights

    def test_repeats(self, new_learner, prune, at_target):
        "The same seed gives the same bits"
        def run():
            learn = new_learner()
            learn.fit_one_cycle(2, 1e-2, cbs=prune(.9))
            at_target(learn.model)
            return bits(learn.model)
        assert_same(run(), run())

    @pytest.mark.slow
    def test_threads(self, tmp_path, at_target, with_fasterai):
        "One thread and two prune the same weights"
        # PyTorch's own training differs in the last bits. So noise changes the weights, and the learning rate is 0.
        # Each runs in a process of its own, since PyTorch remembers that it had two threads.
        def run(n_threads):
            code = new_process.format(path=str(tmp_path)) + f"""
    gen = torch.Generator().manual_seed(0)
    def change(learn):
        for p in learn.model.parameters(): p.data += .01*torch.randn(p.shape, generator=gen)
    cb = {'fasterai_callback' if with_fasterai else 'our_callback'}(.9)
    learn.fit(2, 0., cbs=[cb, before_training_batches(change)])
    torch.save(dict(learn.model.named_parameters()), learn.path/'weights.pth')"""
            run_python(code, env=os.environ | dict(OMP_NUM_THREADS=str(n_threads)), check=True)
            return torch.load(tmp_path/'weights.pth')
        weights = run(1)
        assert_same(weights, run(2))
        net = tiny_net()
        net.load_state_dict(weights, strict=False)
        at_target(net)


def assert_sound_statistics(net):
    "The first batch norm has the mean, over the training set, of what the weights as they are give it"
    outputs = net[0](tiny_data()[0][:36]).transpose(0, 1).flatten(1)
    assert ((net[1].running_mean - outputs.mean(1))/outputs.std(1)).abs().max() < .03


class TestBatchNorm:
    "Batch-norm statistics"

    def test_end(self, new_learner, prune):
        "The statistics of batch norms belong to the weights that are left, though these were pruned in few batches"
        learn = new_learner()
        learn.fit_one_cycle(2, .1, cbs=prune(.9))
        assert_sound_statistics(learn.model)

    def test_stopped(self, new_learner, prune):
        "So do they after Ctrl-C in the middle of an epoch"
        learn = new_learner()
        with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(3, .1, cbs=[prune(.9), Break(KeyboardInterrupt, batch=4)])
        assert_sound_statistics(learn.model)


class TestCheckpoints:
    "Checkpoints"

    @pytest.mark.parametrize('kwargs', [
        {}, dict(with_opt=True), dict(every_epoch=True, with_opt=True), dict(at_end=True)], ids=str)
    def test_save_model(self, new_learner, prune, kwargs):
        "SaveModelCallback: best, every epoch, at the end, with the optimizer"
        learn = new_learner()
        learn.fit_one_cycle(2, 1e-2, cbs=[prune(.9), SaveModelCallback(**kwargs)])
        name = 'model_1' if kwargs.get('every_epoch') else 'model'
        again = new_learner().load(name, weights_only=False)
        assert_same(bits(again.model), bits(learn.model))
        assert all(n_zeros(again.model).values())

    def test_save_load(self, new_learner, prune, at_target):
        "learn.save and learn.load"
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=prune(.9))
        learn.save('mine')
        again = new_learner().load('mine', weights_only=False)
        at_target(again.model)
        x, _ = tiny_data()
        assert torch.equal(again.model.eval()(x), learn.model.eval()(x))

    def test_strict(self, new_learner, prune):
        "A checkpoint of the middle of a training loads strictly into a model that was never pruned"
        kept = []
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=[prune(.9), Callback(before_validate=lambda self: kept.append(bits(self.model)))])
        assert kept[0].keys() == tiny_net().state_dict().keys()
        net = tiny_net()
        net.load_state_dict(kept[0])
        assert all(n_zeros(net).values())

    @pytest.mark.slow
    @pytest.mark.filterwarnings('ignore::UserWarning')  # `load_learner` warns of pickles
    def test_export(self, item_learner, prune, tmp_path):
        "export, and load_learner in a process without the package"
        learn = item_learner()
        learn.fit(1, 1e-2, cbs=prune(.9))
        learn.export('learner.pkl')
        code = """
            for name in ('onecycle_prune', 'fasterai'): sys.modules[name] = None
            from fastai.basics import load_learner
            model = load_learner('learner.pkl').model
            assert int((model[3].weight == 0).sum()) > 1000"""
        run_python(code, cwd=tmp_path, check=True)
        again = load_learner(tmp_path/'learner.pkl')
        assert n_zeros(again.model) == n_zeros(learn.model)
        with again.no_bar(): assert torch.equal(again.predict(3)[2], learn.predict(3)[2])

    @pytest.mark.parametrize('copied', [
        copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
    def test_copies(self, new_learner, prune, copied):
        "deepcopy and pickle of model and callback in the middle of a training"
        copies = []
        cb, learn = prune(.9), new_learner()
        def take(self):
            if self.epoch == 1 and self.iter == 2: copies.append(copied((self.model, cb.sparsifier)))
        learn.fit(3, 1e-2, cbs=[cb, Callback(before_batch=take)])
        (model, sparsifier), = copies
        assert n_zeros(model)['3'] > 0 and sparsifier is not cb.sparsifier

    def test_pickle_learner(self, new_learner, prune, at_target):
        "pickle of the learner with its callbacks in the middle of a training, and a training that continues from it"
        learn, cb = new_learner(cbs=prune(.9)), Snapshot()
        learn.fit(3, 1e-2, cbs=cb)
        again = pickle.loads(cb.pickled)
        assert n_zeros(again.model)['3'] > 0
        again.fit(1, 1e-2)
        at_target(again.model)

    def test_save_learner(self, new_learner, prune, at_target):
        "torch.save of the whole learner with the callback, and a training that continues from it"
        learn = new_learner(cbs=prune(.9))
        learn.fit(1, 1e-2)
        torch.save(learn, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
        again.fit(1, 1e-2)
        at_target(again.model)

    def test_log(self, new_learner, prune, at_target):
        "CSVLogger: as many columns as names"
        learn = new_learner(metrics=accuracy)
        learn.fit(2, 1e-2, cbs=[prune(.9), CSVLogger()])
        assert pd.read_csv(learn.path/'history.csv').notna().all(None)
        at_target(learn.model)

    def test_tensorboard(self, new_learner, prune, at_target, tmp_path):
        "TensorBoardCallback"
        pytest.importorskip('tensorboard')
        from fastai.callback.tensorboard import TensorBoardCallback
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=[prune(.9), TensorBoardCallback(tmp_path/'log', trace_model=False, log_preds=False)])
        assert list((tmp_path/'log').iterdir())
        at_target(learn.model)


class TestResume:
    "Resume"

    @pytest.mark.parametrize('criterion', [None, *criteria], ids=str)
    def test_every_criterion(self, new_learner, prune, at_target, criterion, with_fasterai):
        "fit_one_cycle(start_epoch=...) in a new learner after an error: bit for bit the training without the error"
        if with_fasterai and criterion: pytest.skip('its criteria have other names')
        kwargs = dict(criteria=criterion) if criterion else {}
        save = SaveModelCallback(every_epoch=True, with_opt=True)
        torch.manual_seed(1)
        whole = new_learner()
        whole.fit_one_cycle(4, 1e-2, cbs=prune(.9, **kwargs))
        torch.manual_seed(1)
        broken = [prune(.9, **kwargs), save, Break(RuntimeError('broken'), epoch=2)]
        with pytest.raises(RuntimeError): new_learner().fit_one_cycle(4, 1e-2, cbs=broken)
        torch.manual_seed(2)
        resumed = new_learner().load('model_1', with_opt=True, weights_only=False)
        resumed.fit_one_cycle(4, 1e-2, start_epoch=2, cbs=prune(.9, **kwargs))
        assert_same(bits(resumed.model), bits(whole.model))
        at_target(resumed.model)

    @pytest.mark.slow
    @pytest.mark.parametrize('criterion', ['large_final', 'movement'])
    def test_kill(self, new_learner, prune, at_target, tmp_path, criterion, with_fasterai):
        "The same after kill -9 in the middle of an epoch, in a new process"
        if with_fasterai: pytest.skip('as the situation before')
        code = new_process.format(path=str(tmp_path)) + f"""
    import os, signal
    def die(self):
        if self.epoch == 2 and self.iter == 3: os.kill(os.getpid(), signal.SIGKILL)
    save = SaveModelCallback(every_epoch=True, with_opt=True)
    learn.fit_one_cycle(4, 1e-2, cbs=[our_callback(.9, criteria='{criterion}'), save, Callback(before_batch=die)])"""
        assert run_python(code).returncode == -9
        whole = new_learner(path=tmp_path/'other')
        resumed = new_learner().load('model_1', with_opt=True, weights_only=False)
        whole.fit_one_cycle(4, 1e-2, cbs=prune(.9, criteria=criterion))
        resumed.fit_one_cycle(4, 1e-2, start_epoch=2, cbs=prune(.9, criteria=criterion))
        assert_same(bits(resumed.model), bits(whole.model))
        at_target(resumed.model)

    def test_no_file(self, new_learner, prune, at_target):
        "No extra file is written if the weights hold everything that is needed"
        learn = new_learner()
        learn.fit(1, 1e-2, cbs=[prune(.9), SaveModelCallback()])
        assert [p.name for p in learn.path.rglob('*') if p.is_file()] == ['model.pth']
        at_target(learn.model)

    def test_memory_missing(self, new_learner, prune, with_fasterai):
        "A criterion that needs the first weights raises an error if their file is missing, or is of another training"
        if with_fasterai: pytest.skip('it has no such file')
        learn, cb = new_learner(), partial(prune, .9, criteria='movement')
        learn.fit(2, 1e-2, cbs=[cb(), SaveModelCallback(every_epoch=True)])
        other = new_learner()
        with pytest.raises(ValueError, match='sparsity_memory.pth belongs to another training'):
            other.fit(3, 1e-2, start_epoch=2, cbs=cb())
        (learn.path/'models'/'sparsity_memory.pth').unlink()
        with pytest.raises(FileNotFoundError, match='movement compares with the start of training.*train from epoch 0'):
            learn.fit(3, 1e-2, start_epoch=2, cbs=cb())
        assert_same(bits(other.model), bits(tiny_net()))


class TestInterruptions:
    "Interruptions"

    @pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'before_step', 'after_step', 'after_batch'])
    @pytest.mark.parametrize('ex', [
        KeyboardInterrupt, RuntimeError('broken'), CancelFitException], ids=['ctrl-c', 'error', 'cancel'])
    def test_interrupted(self, new_learner, prune, at_target, ex, event):
        "Ctrl-C, an error in another callback or the data, CancelFit: pruned weights stay pruned, the next fit works"
        learn, seen = new_learner(), []
        try: learn.fit(3, 1e-2, cbs=[prune(.9), note_masks(seen), Break(ex, event=event)])
        except (KeyboardInterrupt, RuntimeError): pass
        assert stay_zero(seen[-1], learn.model) and seen[-1]['3'].any()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
        assert learn.model.state_dict().keys() == tiny_net().state_dict().keys()
        learn.fit(1, 1e-2, cbs=prune(.9))
        at_target(learn.model)

    def test_in_the_optimizer(self, new_learner, prune):
        "Ctrl-C between the optimizer's step and the pruning after it"
        class First(Callback):
            order = -100  # before all others
            def after_step(self):
                if self.epoch == 1 and self.iter == 2: raise KeyboardInterrupt
        learn, seen = new_learner(), []
        with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-2, cbs=[prune(.9), First(), note_masks(seen)])
        assert stay_zero(seen[-1], learn.model) and seen[-1]['3'].any()

    @pytest.mark.parametrize('ex', [CancelBatchException, CancelTrainException, CancelEpochException])
    def test_cancelled(self, new_learner, prune, at_target, ex):
        "A batch, a training loop or an epoch is cancelled"
        learn = new_learner()
        learn.fit(3, 1e-2, cbs=[prune(.9), Break(ex)])
        at_target(learn.model)

    def test_early_stopping(self, new_learner, prune, at_target, recwarn):
        "EarlyStoppingCallback stops before the target, and a warning says so"
        learn = new_learner()
        learn.fit(5, 0., cbs=[prune(.9), EarlyStoppingCallback(min_delta=100.)])
        assert len(learn.recorder.values) < 5 and any('ended early' in str(w.message) for w in recwarn)
        learn.fit(1, 1e-2, cbs=prune(.9))
        at_target(learn.model)

    def test_terminate_on_nan(self, new_learner, prune, at_target):
        "TerminateOnNaNCallback"
        learn = new_learner()
        def spoil(self):
            if self.epoch == 1: self.learn.loss = self.loss*torch.nan
        learn.fit(3, 1e-2, cbs=[prune(.9), TerminateOnNaNCallback(), Callback(after_loss=spoil)])
        assert all(w.isfinite().all() for w in learn.model.parameters())
        learn.fit(1, 1e-2, cbs=prune(.9))
        at_target(learn.model)


class TestFastai:
    "fastai's functions and callbacks"

    def test_lr_find(self, new_learner, prune, at_target):
        "lr_find with the callback on the learner changes nothing"
        learn, probe = new_learner(cbs=prune(.9)), Probe(total_zeros)
        before = bits(learn.model)
        with learn.no_bar(), learn.added_cbs(probe): learn.lr_find(num_it=8, show_plot=False, suggest_funcs=())
        assert_same(bits(learn.model), before)
        assert len(probe.seen) >= 5 and not any(probe.seen)
        learn.fit(1, 1e-2)
        at_target(learn.model)

    def test_lr_find_between(self, new_learner, prune, at_target, recwarn):
        "lr_find on a pruned learner changes nothing"
        learn = new_learner()
        learn.fit(1, 1e-2, cbs=prune(.9))
        before = bits(learn.model)
        with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False, suggest_funcs=())
        assert_same(bits(learn.model), before)
        at_target(learn.model)
        assert not any('trained again' in str(w.message) for w in recwarn)

    def test_validate(self, new_learner, prune, at_target):
        "validate and get_preds with the callback on the learner change nothing"
        cb = prune(.9)
        learn = new_learner(cbs=cb, metrics=accuracy)
        learn.fit(1, 1e-2)
        def evaluate(): return list(learn.validate()), learn.get_preds(with_loss=True)
        before = bits(learn.model)
        learn.remove_cb(cb)
        metrics, preds = evaluate()
        assert len(metrics) == 2 and len(preds) == 3
        for o in cb, prune(.5):  # one that has trained, and one that has not
            learn.add_cb(o)
            same_metrics, same_preds = evaluate()
            assert same_metrics == metrics
            for a, b in zip(same_preds, preds, strict=True): assert torch.equal(a, b)
            learn.remove_cb(o)
        assert_same(bits(learn.model), before)
        at_target(learn.model)

    def test_predict(self, item_learner, prune, at_target):
        "predict"
        learn = item_learner(cbs=prune(.9))
        learn.fit(1, 1e-2)
        before, (*_, pred) = bits(learn.model), learn.predict(3)
        assert torch.allclose(pred, learn.model.eval()(tiny_data()[0][3:4])[0], atol=1e-6)
        assert_same(bits(learn.model), before)
        at_target(learn.model)

    @pytest.mark.parametrize('pct', [.1, .5, .99])
    def test_short_epoch(self, new_learner, prune, at_target, pct):
        "ShortEpochCallback: the target is reached at the end"
        learn = new_learner()
        learn.fit(3, 1e-2, cbs=[prune(.9), ShortEpochCallback(pct)])
        at_target(learn.model)

    @pytest.mark.parametrize('layers', [None, '0'], ids=['all', 'only frozen ones'])
    def test_fine_tune(self, new_learner, prune, at_target, layers):
        "fine_tune: frozen layers are not pruned, and all layers reach the target at the end"
        learn, ends = new_learner(splitter=lambda m: [params(m[:6]), params(m[6:])]), []
        note = Callback(after_epoch=lambda self: ends.append(zero_masks(self.model)))
        learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=[prune(.9, **(dict(layers=layers) if layers else {})), note])
        assert not ends[0]['0'].any() and not ends[0]['3'].any()
        at_target(learn.model, names=layers or '038')
        assert stay_zero(ends[0], learn.model)

    def test_freeze_to(self, new_learner, prune, at_target):
        "freeze_to, then unfreeze"
        learn = new_learner(splitter=lambda m: [params(m[:3]), params(m[3:6]), params(m[6:])])
        learn.freeze_to(-2)
        learn.fit(1, 1e-2, cbs=prune(.9))
        assert not n_zeros(learn.model)['0']
        at_target(learn.model, names='38')
        learn.unfreeze()
        learn.fit(1, 1e-2, cbs=prune(.9))
        at_target(learn.model)

    def test_discriminative(self, new_learner, prune, at_target):
        "Discriminative learning rates"
        learn = new_learner(splitter=lambda m: [params(m[:6]), params(m[6:])])
        learn.fit_one_cycle(2, slice(1e-4, 1e-2), cbs=prune(.9))
        at_target(learn.model)

    @pytest.mark.parametrize('n_acc', [16, 24])
    def test_accumulation(self, new_learner, prune, at_target, n_acc):
        "GradientAccumulation, with an epoch that does not divide"
        learn = new_learner()
        learn.fit(3, 1e-2, cbs=[prune(.9), GradientAccumulation(n_acc)])
        at_target(learn.model)

    @pytest.mark.parametrize('cb', [GradientClip, MixUp, CutMix])
    def test_other_callbacks(self, new_learner, prune, at_target, cb):
        "GradientClip, MixUp, CutMix"
        learn = new_learner()
        learn.loss_func = CrossEntropyLossFlat()
        learn.fit(2, 1e-2, cbs=[prune(.9), cb()])
        at_target(learn.model)

    @pytest.mark.parametrize('fit', [
        lambda learn, cb: learn.fit_flat_cos(3, 1e-2, cbs=cb),
        lambda learn, cb: learn.fit_sgdr(2, 1, 1e-2, cbs=cb),
        lambda learn, cb: learn.fit(3, 1e-2, cbs=cb)], ids=['flat_cos', 'sgdr', 'fit'])
    def test_fits(self, new_learner, prune, at_target, fit):
        "fit, fit_flat_cos, fit_sgdr"
        learn = new_learner()
        fit(learn, prune(.9))
        at_target(learn.model)

    @pytest.mark.parametrize('first,second', [(.9, .5), (.3, .8), (.9, .9)])
    def test_second_fit(self, new_learner, prune, at_target, first, second):
        "A second fit with another target, or with the same"
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=prune(first))
        learn.fit(2, 1e-2, cbs=prune(second))
        at_target(learn.model, second)

    def test_second_fit_keeps_zeros(self, new_learner, prune, at_target):
        "A second fit with a higher target keeps all that is pruned"
        learn, seen = new_learner(), []
        learn.fit(2, 1e-2, cbs=prune(.5))
        before = zero_masks(learn.model)
        note = Callback(after_batch=lambda self: seen.append(stay_zero(before, self.model)))
        learn.fit(2, 1e-2, cbs=[prune(.8), note])
        assert all(seen) and before['3'].any()
        at_target(learn.model, .8)

    def test_two_callbacks(self, new_learner, prune, at_target):
        "Two callbacks on different layers in one training"
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=[prune(.9, layers=nn.Conv2d), prune(.5, layers=nn.Linear)])
        at_target(learn.model, names='03')
        at_target(learn.model, .5, names='8')
        assert len(learn.recorder.metric_names) == len(set(learn.recorder.metric_names))

    def test_without_callback(self, new_learner, prune):
        "A later fit without the callback: the zeros stay, or a warning names the layers"
        learn = new_learner()
        learn.fit(1, 1e-2, cbs=prune(.9))
        before = zero_masks(learn.model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            learn.fit(1, 1e-2)
        assert before['3'].any()
        named = any('trained again: 0 (90% zeros), 3' in str(w.message) for w in caught)
        assert stay_zero(before, learn.model) or named

    optimizers = {
        'SGD': SGD, 'momentum': momentum_sgd, 'RMSProp': RMSProp, 'Adam': Adam, 'RAdam': RAdam, 'QHAdam': QHAdam,
        'Larc': partial(Larc, mom=.9), 'Lamb': Lamb, 'ranger': ranger,
        'Lookahead': lambda p, lr: Lookahead(Adam(p, lr=lr)),
        'torch-SGD': partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)),
        'AdamW': partial(OptimWrapper, opt=torch.optim.AdamW),
        'AdamW-foreach': partial(OptimWrapper, opt=partial(torch.optim.AdamW, foreach=True)),
        'AdamW-fused': partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True)),
        'torch-RMSprop': partial(OptimWrapper, opt=partial(torch.optim.RMSprop, momentum=.9))}

    @pytest.mark.parametrize('opt_func', optimizers.values(), ids=optimizers)
    def test_optimizers(self, new_learner, prune, at_target, opt_func):
        "Every optimizer of fastai and several of PyTorch, foreach and fused forms included: no pruned weight returns"
        learn, seen = new_learner(opt_func=opt_func), []
        learn.fit(2, 1e-3, cbs=[prune(.9), Callback(before_batch=lambda self: seen.append(zero_masks(self.model)))])
        at_target(learn.model)
        for a, b in zip(seen, seen[1:]): assert all(not (a[n] & ~b[n]).any() for n in a)


class TestPrecision:
    "Precision and layout"

    # On a CPU, fastai's own callbacks leave the precision as it is, and `BFloat16` changes it.
    @pytest.mark.parametrize('mix', [Learner.to_bf16, Learner.to_fp16, lambda learn: learn.add_cb(BFloat16())],
        ids=['to_bf16', 'to_fp16', 'BFloat16'])
    def test_mixed(self, new_learner, prune, at_target, mix):
        "to_fp16 and to_bf16"
        learn = mix(new_learner())
        learn.fit(2, 1e-2, cbs=prune(.9))
        at_target(learn.model)

    @pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, new_learner, prune, at_target, dtype):
        "Weights in float64, bfloat16 or float16"
        learn = new_learner(tiny_net().to(dtype))
        learn.loss_func = lambda pred, y: nn.functional.cross_entropy(pred.float(), y)
        def cast(self): self.learn.xb = tuple(x.to(dtype) for x in self.xb)
        learn.fit(2, 1e-3, cbs=[prune(.9), Callback(before_batch=cast)])
        at_target(learn.model)

    def test_channels_last(self, new_learner, prune, at_target):
        "channels-last"
        learn = new_learner(tiny_net().to(memory_format=torch.channels_last))
        learn.fit(2, 1e-2, cbs=prune(.9))
        at_target(learn.model)

    def test_not_contiguous(self, new_learner, prune, at_target):
        "Weights that are views, with gaps in between"
        net = tiny_net()
        for n in n_weights:
            w = net[int(n)].weight.data
            net[int(n)].weight.data = torch.stack([w, w], -1)[..., 0]
        assert not net[3].weight.is_contiguous()
        learn = new_learner(net)
        learn.fit(2, 1e-2, cbs=prune(.9))
        at_target(learn.model)

    def test_skipped_steps(self, new_learner, prune, at_target):
        "Steps that a GradScaler skips because gradients overflow"
        def scale(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=1.)  # fastai's works on GPUs only
        def spoil(self):
            if self.iter % 2:
                for p in self.model.parameters(): p.grad.fill_(torch.inf)
        learn, seen = new_learner().to_fp16(), []
        overflow = Callback(before_train=scale, after_backward=spoil)
        learn.fit(3, 1e-2, cbs=[prune(.9), overflow, note_masks(seen)])
        at_target(learn.model)
        assert stay_zero(seen[-1], learn.model)


class TestDegenerate:
    "Degenerate trainings"

    @pytest.mark.parametrize('schedule', ['one_cycle', 'agp'])
    def test_short_loader(self, new_learner, prune, at_target, schedule, with_fasterai, recwarn):
        "A loader that yields fewer batches than its length, as fastai's distributed one does with drop_last"
        if with_fasterai and schedule != 'one_cycle': pytest.skip('as the variant before')
        class Longer(DataLoader):
            def __len__(self): return super().__len__() + 1
        learn = new_learner()
        learn.dls.train = Longer(learn.dls.train.dataset, bs=8)
        learn.fit(2, 1e-2, cbs=prune(.9, **({} if schedule == 'one_cycle' else dict(schedule=schedule))))
        at_target(learn.model)
        assert not any('ended early' in str(w.message) for w in recwarn)

    @pytest.mark.parametrize('n', [1, 2])
    def test_few_batches(self, new_learner, prune, at_target, n):
        "A training of one batch, or of two"
        learn = new_learner()
        learn.dls.train = DataLoader(learn.dls.train.dataset[:8*n], bs=8)
        learn.fit(1, 1e-2, cbs=prune(.9))
        at_target(learn.model)

    def test_one_item(self, new_learner, prune):
        "One epoch of one item"
        learn = new_learner(nn.Sequential(nn.Flatten(), nn.Linear(144, 4)))
        learn.dls.train = DataLoader(learn.dls.train.dataset[:1], bs=1)
        learn.fit(1, 1e-2, cbs=prune(.9))
        assert n_zeros(learn.model)['1'] == round(.9*576)

    def test_no_validation(self, new_learner, prune, at_target):
        "An empty validation set"
        learn = new_learner(metrics=accuracy)
        learn.dls = DataLoaders(learn.dls.train, [])
        learn.fit(2, 1e-2, cbs=prune(.9))
        at_target(learn.model)

    @pytest.mark.parametrize('opt_func', [momentum_sgd, adam], ids=['sgd', 'adam'])
    def test_zero(self, new_learner, prune, opt_func):
        "Sparsity 0 is bit for bit a dense training, with the same random numbers"
        def run(*cbs):
            torch.manual_seed(5)
            learn = new_learner(nn.Sequential(tiny_net(), nn.Dropout(.5)), opt_func=opt_func)
            learn.fit_one_cycle(2, 1e-2, cbs=list(cbs))
            return bits(learn.model), torch.rand(3)
        assert_same(run(prune(0.)), run())

    def test_one(self, new_learner, prune, recwarn):
        "Sparsity 1 warns, and each layer keeps a weight"
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=prune(1.))
        assert all(n_zeros(learn.model)[n] == k-1 for n, k in n_weights.items())
        assert any('One group of each layer is kept' in str(w.message) for w in recwarn)

    def test_tiny_layer(self, new_learner, prune, tolerance):
        "A layer of a single weight"
        learn = new_learner(nn.Sequential(nn.Flatten(), nn.Linear(144, 1), nn.Linear(1, 1), nn.Linear(1, 4)))
        learn.fit(2, 1e-2, cbs=prune(.9))
        zeros = n_zeros(learn.model)
        assert abs(zeros['1'] - 130) <= tolerance*144 and zeros['2'] == 0 and 2 <= zeros['3'] <= 3

    def test_zero_layer(self, new_learner, prune, tolerance):
        "A layer that starts at zero, as the last of a residual branch, can still learn"
        net = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Linear(16, 4))
        net[2].weight.data.zero_()
        learn, probe = new_learner(net), Probe(lambda model: n_zeros(model)['2'])
        learn.fit(4, 1e-2, cbs=[prune(.9), probe])
        assert probe.seen[0] < 5 and abs(probe.seen[-1] - 58) <= tolerance*64


class AverageWeights(Callback):
    "An exponential moving average of the weights, in the manner of fastxtend's and timm's"
    order = 11
    def __init__(self, wrap=copy.deepcopy, replace=False, swap=True, order=11):
        self.wrap, self.replace, self.swap, self.order = wrap, replace, swap, order
    def before_fit(self): self.ema_model = self.wrap(self.model)
    def after_batch(self):
        if not self.training: return
        values = zip(self.ema_model.parameters(), self.model.parameters())
        for average, p in values: average.data.lerp_(p.data, .1)
    def before_validate(self):
        if self.swap: self.trained, self.learn.model = self.learn.model, self.ema_model
    def after_validate(self):
        if self.swap: self.learn.model = self.trained
    def after_fit(self):
        if self.replace: self.learn.model = self.ema_model
        else: self.learn.model_ema = self.ema_model


class ScheduleFree(Callback):
    "Other weights are evaluated than are trained, as with schedule-free optimizers, and are left when the fit ends"
    def before_fit(self): self.average = [p.detach().clone() for p in self.model.parameters()]
    def after_batch(self):
        if self.training:
            for a, p in zip(self.average, self.model.parameters()): a.lerp_(p.data, .1)
    def exchange(self):
        for a, p in zip(self.average, self.model.parameters()): a[:], p.data[:] = p.data.clone(), a.clone()
    before_validate = after_validate = after_fit = exchange


class SecondOptimizer(Callback):
    "Another optimizer steps once after each epoch of training"
    def before_fit(self): self.second = torch.optim.SGD(self.model.parameters(), lr=.1)
    def after_train(self):
        nn.functional.cross_entropy(self.model(self.xb[0]), self.yb[0]).backward()
        self.second.step()
        self.second.zero_grad()


def add_noise(model):
    for p in model.parameters(): p.data.add_(.01)


def late(order=200, **events):
    "A callback that runs after `SparsifyCallback`"
    cb = Callback(**events)
    cb.order = order
    return cb


changes = {
    'noise after the step': lambda: late(after_batch=lambda self: add_noise(self.model)),
    'noise at the end': lambda: late(after_fit=lambda self: add_noise(self.model)),
    'a second optimizer': SecondOptimizer,
    'a schedule-free optimizer': ScheduleFree,
    'an average for validation': AverageWeights,
    'an average in place of the model': partial(AverageWeights, replace=True),
    'an average in place of the model, late': partial(AverageWeights, replace=True, order=200),
    'a replaced model': lambda: late(before_validate=lambda self: setattr(self.learn, 'model',
        add_noise(self.model) or copy.deepcopy(self.model))),
    'a replaced layer': lambda: late(after_train=lambda self: self.model.__setitem__(3, nn.Conv2d(8, 16, 3)))}


class TestKept:
    "The model that is kept"

    @pytest.mark.parametrize('change', changes.values(), ids=changes)
    def test_changed(self, new_learner, prune, at_target, change, tolerance):
        "Weights, layers or the model are changed after the step: validation and the end have the table's sparsity"
        learn, validated = new_learner(), []
        look = Callback(before_validate=lambda self: validated.append(n_zeros(self.model)))
        look.order = 2000
        learn.fit(3, 1e-2, cbs=[change(), prune(.9), look])
        at_target(learn.model)
        for n, k in n_weights.items(): assert abs(validated[-1][n] - round(.9*k)) <= tolerance*k

    @pytest.mark.parametrize('wrap', [copy.deepcopy, torch.optim.swa_utils.AveragedModel], ids=['copy', 'torch'])
    def test_averages(self, new_learner, prune, at_target, wrap):
        "An average of the weights that the learner keeps next to its model"
        learn, average = new_learner(), AverageWeights(wrap, swap=False)
        learn.fit(3, 1e-2, cbs=[prune(.9), average])
        at_target(getattr(learn.model_ema, 'module', learn.model_ema))
        at_target(learn.model)

    def test_teacher(self, new_learner, prune, at_target):
        "A dense teacher in a callback stays dense"
        learn, teach = new_learner(), Callback()
        teach.teacher = tiny_net()
        learn.fit(2, 1e-2, cbs=[prune(.9), teach])
        at_target(learn.model)
        assert not total_zeros(teach.teacher)

    def test_saved(self, new_learner, prune, at_target, tmp_path):
        "A checkpoint of each epoch is as sparse as the table says, although the weights were changed after the step"
        learn = new_learner()
        noise = late(55, after_epoch=lambda self: add_noise(self.model)) # before the checkpoint is saved
        learn.fit(2, 1e-2, cbs=[prune(.9), noise, SaveModelCallback(every_epoch=True)])
        saved = tiny_net()
        saved.load_state_dict(torch.load(tmp_path/'models/model_1.pth'), strict=False)
        at_target(saved)


class TestFreed:
    "Layers that are frozen and freed in a fit"

    def test_gradual(self, new_learner, prune, at_target):
        "A callback frees a layer in each epoch: each joins at the schedule's sparsity, and all reach the target"
        learn, seen = new_learner(), []
        def free(self):
            for i, n in enumerate([8, 3, 0]): self.model[n].requires_grad_(self.epoch >= i)
        note = late(after_step=lambda self: seen.append(n_zeros(self.model)))
        learn.model[0].requires_grad_(False)
        learn.fit(4, 1e-2, cbs=[Callback(before_epoch=free), prune(.9), note])
        at_target(learn.model)
        assert not seen[2*5 - 1]['0'] and seen[2*5]['0'] > 0

    def test_gradual_global(self, new_learner, prune, tolerance):
        "The same in one pool"
        learn = new_learner()
        learn.model[0].requires_grad_(False)
        free = Callback(before_epoch=lambda self: self.model[0].requires_grad_(self.epoch > 1))
        learn.fit(4, 1e-2, cbs=[free, prune(.9, 'global')])
        assert abs(total_zeros(learn.model) - round(.9*total_weights)) <= tolerance*total_weights

    def test_alternating(self, new_learner, prune, at_target):
        "Two parts are trained in turn, as in a GAN"
        learn = new_learner()
        def switch(self):
            if not self.training: return
            self.model[:6].requires_grad_(self.iter % 2 == 0)
            self.model[6:].requires_grad_(self.iter % 2 == 1)
        learn.fit(3, 1e-2, cbs=[Callback(before_batch=switch), prune(.9)])
        at_target(learn.model)


class TestLater:
    "Trainings of a pruned model"

    def test_other_learner(self, new_learner, prune, with_fasterai):
        "Saved, loaded in another learner, and trained without the callback: a warning names the layers"
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=prune(.9))
        learn.save('pruned')
        other = new_learner()
        other.load('pruned')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            other.fit(1, 1e-2)
        assert any('trained again: 0 (90% zeros), 3' in str(w.message) for w in caught)

    def test_lower_target(self, new_learner, prune):
        "A second fit with a lower target: a warning says how many weights return"
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=prune(.9))
        with pytest.warns(UserWarning, match='pruned groups return in 0, 3, 8'): learn.fit(1, 1e-2, cbs=prune(.5))

    def test_no_false_alarm(self, new_learner, prune, at_target, recwarn):
        "A dense model, also one with a layer that starts at zero, is trained without a warning"
        learn = new_learner()
        learn.model[8].weight.data.zero_()
        learn.fit(1, 1e-2)
        learn.fit(1, 1e-2, cbs=prune(.9))
        assert not any('trained again' in str(w.message) or 'return in' in str(w.message) for w in recwarn)
        at_target(learn.model)


class Standardized(nn.Conv2d):
    "A convolution with the standardized weight"
    def used(self):
        w = self.weight
        return (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    def forward(self, x): return nn.functional.conv2d(x, self.used(), self.bias)


class LastOutput(nn.Module):
    "An LSTM over the pixels of an image, and a linear layer"
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 4)
    def forward(self, x): return self.head(self.lstm(x.flatten(2).transpose(1, 2))[0][:, -1])


class TestTruth:
    "What the table says and what the network does"

    def test_standardized(self, new_learner, prune, tolerance):
        "Weight standardization: the weights in use are sparse, or an error names the layer"
        net = nn.Sequential(nn.Conv2d(4, 8, 3), Standardized(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(8, 4))
        try: new_learner(net).fit(2, 1e-2, cbs=prune(.9))
        except ValueError as e: assert 'no effect: 1.' in str(e)
        else: assert float((net[1].used() == 0).float().mean()) >= .9 - tolerance

    def test_recurrent(self, new_learner, prune, tolerance):
        "A recurrent network: the share of all weights that is zero, or a warning says what is left out"
        net = LastOutput()
        new_learner(net).fit(2, 1e-2, cbs=prune(.9))
        matrices = [p for p in net.parameters() if p.ndim > 1]
        share = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
        assert share >= .9 - tolerance - .01

    @pytest.mark.parametrize('target', [.9, .97])
    def test_batchnorm(self, new_learner, prune, target):
        "Fast pruning: batch-norm statistics are those of the weights that are left"
        learn = new_learner()
        learn.fit(2, 1e-2, cbs=prune(target))
        x = tiny_data()[0][:36]
        with torch.no_grad(): inputs = learn.model[0](x)
        mean, var = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3))
        kept = var > 1e-6
        assert torch.allclose(learn.model[1].running_var[kept], var[kept], rtol=.2)
        assert torch.allclose(learn.model[1].running_mean[kept], mean[kept], atol=.2*float(var.max())**.5)
