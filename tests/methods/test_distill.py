"""`DistillCallback` and `SimulatedPruning` keep their promises in real trainings.

The loss is computed by hand in float64, and what a teacher or a student is like is read from its tensors."""
import copy, math, pickle

import numpy as np, pytest, torch
from fastai.basics import (BCEWithLogitsLossFlat, Callback, CancelBackwardException, CancelBatchException,
    CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, MSELossFlat, accuracy, load_learner)
from fastai.callback.all import (AMPMode, CutMix, GradientAccumulation, MixedPrecision, MixUp, RNNRegularizer,
    SaveModelCallback, SchedCos, rnn_cbs)
from fastai.losses import LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.methods.distill import DistillCallback, SimulatedPruning, distillation_loss
from torch import nn

from helpers import Probe, assert_same, bits
from networks import adam, n_batches, silence, tiny_data, tiny_dls, tiny_net, total_weights
from reference import assert_counts, count_groups, expected_sparsities, layers_of, total_zeros, zero_masks

no_pickle_warning = pytest.mark.filterwarnings('ignore::UserWarning')  # `load_learner` warns of pickles


class Forked(nn.Module):
    "A larger network with a dropout that is in another mode than the rest"
    def __init__(self, n_out=4):
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(nn.Conv2d(4, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(.3), nn.Flatten())
        self.head = nn.Linear(12*16, n_out)
        self.body[3].eval()
        self.head.bias.requires_grad_(False)
    def forward(self, x): return self.head(self.body(x))


@pytest.fixture
def teacher(): return Forked()


def state(model):
    "All that a fit may change in a model, apart from its tensors"
    return [(n, m.training, list(m._forward_hooks), list(m._forward_pre_hooks), sorted(vars(m))) for n, m in
            model.named_modules()], [(n, p.requires_grad, p.grad, p.device) for n, p in model.named_parameters()]


def assert_untouched(teacher, before):
    assert_same(bits(teacher), before[0])
    assert state(teacher) == before[1]


def snapshot(teacher): return bits(teacher), state(teacher)


def by_hand(pred, teacher_pred, t):
    "T²·KL(teacher ‖ student) of predictions of shape (n, classes), as sums of p·log(p/q) in float64"
    p, q = (np.exp(o/t)/np.exp(o/t).sum(1, keepdims=True) for o in (teacher_pred, pred))
    return t**2*(p*np.log(p/q)).sum(1).mean()


class LossNotes(Callback):
    "Note what is differentiated, the loss that is recorded, and all that they are computed from"
    order = DistillCallback.order + .1
    def before_fit(self): self.seen = []
    def after_loss(self):
        if self.training:
            keep = [o.detach().clone().as_subclass(torch.Tensor) for o in (self.loss_grad, self.loss, self.pred)]
            self.seen.append((*keep, self.xb[0].clone(), self.yb[0].clone()))


class TestLoss:
    @pytest.mark.parametrize('t', [.5, 1., 4., 20.])
    def test_formula(self, t):
        rng = np.random.default_rng(0)
        pred, teacher_pred = rng.normal(size=(7, 5))*3, rng.normal(size=(7, 5))*3
        found = distillation_loss(torch.tensor(pred), torch.tensor(teacher_pred), t)
        assert float(found) == pytest.approx(by_hand(pred, teacher_pred, t), rel=1e-12)

    def test_gradient(self):
        "The gradient is T·(q - p)/n, and none reaches the teacher's predictions if they have none"
        pred, teacher_pred = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randn(6, 3).double()
        distillation_loss(pred, teacher_pred, 3.).backward()
        expected = 3*((pred/3).softmax(1) - (teacher_pred/3).softmax(1))/6
        torch.testing.assert_close(pred.grad, expected.detach())

    def test_axis(self):
        "Pixels are predictions too"
        pred, teacher_pred = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
        flat = [o.movedim(1, -1).reshape(-1, 3).numpy() for o in (pred, teacher_pred)]
        assert float(distillation_loss(pred, teacher_pred, 2.)) == pytest.approx(by_hand(*flat, 2.), rel=1e-12)

    @pytest.mark.parametrize('t,weight', [(4., .75), (1., .3), (2., 1.)])
    def test_training(self, new_learner, teacher, t, weight):
        "Each batch differentiates α·T²·KL + (1-α)·cross entropy, in float64, and records the cross entropy"
        learn, losses = new_learner(tiny_net().double()), LossNotes()
        items = [(x.double(), y) for x, y in zip(*tiny_data())]
        learn.dls = DataLoaders(DataLoader(items[:36], bs=8), DataLoader(items[36:], bs=8))
        learn.remove_cb(learn.recorder)  # it averages in float32
        learn.fit(2, 1e-2, cbs=[DistillCallback(teacher.double(), t, weight), losses])
        assert len(losses.seen) == 2*n_batches
        for loss_grad, loss, pred, x, y in losses.seen:
            with torch.no_grad(): teacher_pred = copy.deepcopy(teacher).eval()(x).numpy()
            p = pred.numpy()
            cross_entropy = -(p[range(len(p)), y] - np.log(np.exp(p).sum(1))).mean()
            expected = weight*by_hand(p, teacher_pred, t) + (1-weight)*cross_entropy
            assert float(loss_grad) == pytest.approx(expected, rel=1e-10)
            assert float(loss) == pytest.approx(cross_entropy, rel=1e-10)

    def test_recorded(self, new_learner, teacher):
        "The losses and metrics in the table are those of the model on ordinary targets"
        learn = new_learner(metrics=accuracy)
        learn.fit(2, 1e-2, cbs=DistillCallback(teacher))
        x, y = (torch.stack(o) for o in zip(*learn.dls.valid.dataset))
        with torch.no_grad(): pred = learn.model.eval()(x)
        _, valid_loss, valid_accuracy = learn.recorder.values[-1]
        assert valid_loss == pytest.approx(float(nn.functional.cross_entropy(pred, y)), rel=1e-5)
        assert valid_accuracy == pytest.approx(float((pred.argmax(1) == y).float().mean()))

    def test_segmentation(self, tmp_path):
        "The axis of the classes is that of the loss"
        x, _ = tiny_data()
        items = list(zip(x, x.argmax(1)))
        dls = DataLoaders(DataLoader(items[:36], bs=8), DataLoader(items[36:], bs=8))
        torch.manual_seed(0)
        student, big = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2)
        losses = LossNotes()
        learn = silence(Learner(dls, student, CrossEntropyLossFlat(axis=1), path=tmp_path))
        learn.fit(1, 1e-2, cbs=[DistillCallback(big, 2., 1.), losses])
        for loss_grad, _, pred, x, _ in losses.seen:
            flat = [o.detach().movedim(1, -1).reshape(-1, 4).double().numpy() for o in (pred, big(x))]
            assert float(loss_grad) == pytest.approx(by_hand(*flat, 2.), rel=1e-4)


class TestWeight:
    def test_zero(self, new_learner, teacher):
        "Weight 0 is the training without the callback, bit for bit, and the teacher is not asked"
        calls = []
        teacher.register_forward_hook(lambda *args: calls.append(1))
        learners = [new_learner(), new_learner(), new_learner()]
        for learn, cbs in zip(learners, [[], [DistillCallback(teacher, weight=0)], [DistillCallback(teacher)]]):
            torch.manual_seed(1)
            learn.fit_one_cycle(2, 1e-2, cbs=cbs)
            if learn is learners[1]: assert not calls
        assert_same(bits(learners[0].model), bits(learners[1].model))
        assert not torch.equal(learners[0].model[0].weight, learners[2].model[0].weight)

    def test_schedule(self, new_learner, teacher):
        "The weight follows the position in the training"
        learn, losses = new_learner(), LossNotes()
        learn.fit(3, 1e-2, cbs=[DistillCallback(teacher, 4., SchedCos(.8, 0)), losses])
        for i, (loss_grad, loss, pred, x, _) in enumerate(losses.seen):
            weight = .4*(1 + math.cos(math.pi*i/(3*n_batches)))
            with torch.no_grad(): teacher_pred = copy.deepcopy(teacher).eval()(x).double().numpy()
            expected = weight*by_hand(pred.double().numpy(), teacher_pred, 4.) + (1-weight)*float(loss)
            assert float(loss_grad) == pytest.approx(expected, rel=1e-4)

    def test_only_teacher(self, tmp_path, teacher):
        "With weight 1, the labels have no influence"
        trained = []
        for shift in (0, 1):
            x, y = tiny_data()
            items = list(zip(x, (y+shift) % 4))
            dls = DataLoaders(DataLoader(items[:36], bs=8), DataLoader(items[36:], bs=8))
            learn = silence(Learner(dls, tiny_net(), nn.CrossEntropyLoss(), path=tmp_path))
            learn.fit(1, 1e-2, cbs=DistillCallback(teacher, weight=1))
            trained.append(bits(learn.model))
        assert_same(*trained)

    def test_learns_from_teacher(self, new_learner):
        "A student of wrong answers gives them: the teacher is what it learns from"
        class Second(nn.Module):
            def forward(self, x): return 20*nn.functional.one_hot((x.mean((2, 3)).argmax(1)+1) % 4, 4).float()
        learn = new_learner(opt_func=adam)
        learn.fit(20, 1e-2, cbs=DistillCallback(Second(), 1., 1.))
        x, y = tiny_data()
        with torch.no_grad(): answers = learn.model.eval()(x[:36]).argmax(1)
        assert ((answers == (y[:36]+1) % 4).float().mean()) > .6


class TestTeacher:
    "A teacher is asked in evaluation and without gradient, and stays as it is"
    def test_untouched(self, new_learner, teacher):
        before = snapshot(teacher)
        modes = []
        def _note(m, args, out): modes.append((m.training, m.body[1].training, m.body[3].training, out.requires_grad))
        handle = teacher.register_forward_hook(_note)
        with_hook = state(teacher)
        learn = new_learner()
        dense = bits(learn.model)
        learn.fit(2, 1e-2, cbs=DistillCallback(teacher))
        assert state(teacher) == with_hook
        handle.remove()
        assert_untouched(teacher, before)
        assert modes == [(False, False, False, False)]*(2*n_batches)
        assert all(not torch.equal(w, dense[k]) for k, w in learn.model.named_parameters() if 'weight' in k)

    @pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelFitException, CancelBatchException])
    @pytest.mark.parametrize('where', ['teacher', 'student', 'after_backward'])
    def test_interrupted(self, new_learner, teacher, error, where):
        "Also after an error or Ctrl-C in the middle of a fit, in its own forward pass too"
        before = snapshot(teacher)
        calls = []
        def _raise(*args):
            calls.append(1)
            if len(calls) == 3: raise error('stop')
        learn = new_learner()
        cbs = [DistillCallback(teacher)]
        if where == 'after_backward': cbs.append(Callback(after_backward=_raise))
        else: handle = (teacher.body if where == 'teacher' else learn.model).register_forward_hook(_raise)
        if error in (CancelFitException, CancelBatchException): learn.fit(2, 1e-2, cbs=cbs)
        else:
            with pytest.raises(error): learn.fit(2, 1e-2, cbs=cbs)
        assert len(calls) >= 3
        if where != 'after_backward': handle.remove()
        assert_untouched(teacher, before)
        learn.fit(1, 1e-2, cbs=DistillCallback(teacher))
        assert_untouched(teacher, before)

    def test_learner_as_teacher(self, new_learner, teacher):
        "A learner, its model and a file of it teach the same"
        large = new_learner(teacher)
        students = [new_learner(), new_learner()]
        for learn, given in zip(students, [large, teacher]): learn.fit(1, 1e-2, cbs=DistillCallback(given))
        assert_same(*(bits(o.model) for o in students))

    @no_pickle_warning
    @pytest.mark.parametrize('kind', [str, lambda path: path], ids=['str', 'Path'])
    def test_file(self, item_learner, new_learner, kind):
        large = item_learner()
        large.fit(1, 1e-2)
        large.export('teacher.pkl')
        students = [new_learner(), new_learner()]
        for learn, given in zip(students, [large, kind(large.path/'teacher.pkl')]):
            learn.model[0].weight.data.mul_(.5)
            learn.fit(1, 1e-2, cbs=DistillCallback(given))
        assert_same(*(bits(o.model) for o in students))
        assert not torch.equal(students[0].model[0].weight, tiny_net()[0].weight)

    def test_average(self, new_learner):
        "A teacher that is an average of other weights is not pruned with the student"
        average = torch.optim.swa_utils.AveragedModel(tiny_net())
        before = bits(average)
        cb = DistillCallback(average)
        learn = new_learner(cbs=cb)
        learn.model[0].weight.data.mul_(.5)
        learn.fit(2, 1e-2, cbs=SparsifyCallback(.8))
        assert total_zeros(learn.model) == round(.8*total_weights)
        assert_same(bits(average), before)

    def test_recurrent(self, new_learner):
        "Of several outputs, the first are the predictions, as `RNNCallback` takes them"
        class Several(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = Forked()
            def reset(self): pass
            def forward(self, x): return self.net(x), x, x
        one, two = new_learner(), new_learner()
        one.fit(1, 1e-2, cbs=DistillCallback(Several()))
        two.fit(1, 1e-2, cbs=DistillCallback(Forked()))
        assert_same(bits(one.model), bits(two.model))
        assert not torch.equal(one.model[0].weight, tiny_net()[0].weight)
        student = new_learner(Several(), cbs=rnn_cbs())
        student.fit(1, 1e-2, cbs=DistillCallback(Several()))
        assert not torch.equal(student.model.net.head.weight, Forked().head.weight)

    def test_other_device(self, new_learner, teacher):
        "If it is on another device, a copy is asked, and the teacher stays there"
        cb = DistillCallback(teacher)
        here, there = cb.teacher.on(torch.device('cpu')), cb.teacher.on(torch.device('meta'))
        assert here is cb.teacher and there.model is not teacher
        assert {t.device.type for t in there.tensors()} == {'meta'}
        assert {t.device.type for t in cb.teacher.tensors()} == {'cpu'}
        new_learner().fit(1, 1e-2, cbs=cb)
        assert cb.asked is None

    @pytest.mark.gpu
    def test_gpu(self, new_learner, teacher):
        before = snapshot(teacher)
        learn = new_learner()
        learn.dls.cuda()
        learn.fit(2, 1e-2, cbs=[DistillCallback(teacher), MixedPrecision()])
        assert learn.model[0].weight.is_cuda
        assert_untouched(teacher, before)


class TestBeside:
    "Other callbacks do what they do without a teacher"
    def test_sparsify(self, new_learner, teacher):
        "Counts are exact after each batch, and a pruned weight stays pruned"
        learn = new_learner()
        counts, masks = Probe(count_groups), Probe(zero_masks)
        learn.fit(3, 1e-2, cbs=[SparsifyCallback(.9), DistillCallback(teacher), counts, masks])
        assert_counts(counts.seen, expected_sparsities('one_cycle', .9), 'global')
        for a, b in zip(masks.seen, masks.seen[1:]):
            for n in a: assert not (a[n] & ~b[n]).any()

    @pytest.mark.parametrize('mix', [MixUp, CutMix])
    @pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat,
        LabelSmoothingCrossEntropy], ids=lambda o: o.__name__)
    def test_mixed_inputs(self, new_learner, teacher, mix, loss_func):
        "The teacher sees the inputs that the student sees"
        learn, losses, asked = new_learner(), LossNotes(), []
        learn.loss_func = loss_func()
        teacher.register_forward_pre_hook(lambda m, args: asked.append(args[0].clone()))
        learn.fit(1, 1e-2, cbs=[mix(), DistillCallback(teacher), losses])
        originals = torch.stack([o[0] for o in learn.dls.train.dataset]).split(8)
        assert len(asked) == n_batches
        for seen, original, (loss_grad, loss, pred, x, _) in zip(asked, originals, losses.seen):
            assert_same(seen, x)
            assert not torch.equal(seen, original)
            with torch.no_grad(): teacher_pred = copy.deepcopy(teacher).eval()(x).double().numpy()
            expected = .75*by_hand(pred.double().numpy(), teacher_pred, 4.) + .25*float(loss)
            assert float(loss_grad) == pytest.approx(expected, rel=1e-4)

    def test_accumulation(self, new_learner, teacher):
        "Batches that are accumulated make the step of one large batch"
        class NoNorm(nn.Sequential): pass
        def _net():
            torch.manual_seed(3)
            return NoNorm(nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 4))
        items = list(zip(*tiny_data()))
        trained = []
        for bs, cbs in [(32, []), (8, [GradientAccumulation(32)])]:
            learn = new_learner(_net())
            learn.dls = DataLoaders(DataLoader(items[:32], bs=bs), DataLoader(items[36:], bs=8))
            learn.fit(2, 1e-2, cbs=[DistillCallback(teacher), *cbs])
            trained.append(bits(learn.model))
        assert not torch.equal(trained[0]['1.weight'], bits(_net())['1.weight'])
        torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)

    def test_regularizer(self, new_learner, teacher):
        "A penalty that another callback adds keeps its own weight"
        class Keeps(Callback):
            def after_pred(self): self.out = self.pred
        keeps = Keeps()
        learn, notes = new_learner(), []
        class Notes(Callback):
            order = GradientAccumulation.order - 1
            def after_loss(self):
                if self.training: notes.append((self.loss_grad.item(), self.pred.pow(2).mean().item()))
        class Penalty(RNNRegularizer):
            @property
            def rnn(self): return keeps
        losses = LossNotes()
        learn.fit(1, 1e-2, cbs=[Penalty(alpha=2.), DistillCallback(teacher), keeps, losses, Notes()])
        assert len(notes) == n_batches
        for (total, penalty), (loss_grad, *_) in zip(notes, losses.seen):
            assert total == pytest.approx(float(loss_grad) + 2*penalty, rel=1e-4)

    @pytest.mark.filterwarnings('ignore::UserWarning')  # PyTorch warns that there is no GPU for autocasting
    @pytest.mark.parametrize('mode', list(AMPMode))
    def test_mixed_precision(self, new_learner, teacher, mode):
        before = snapshot(teacher)
        learn = new_learner(cbs=MixedPrecision(amp_mode=mode))
        learn.fit(2, 1e-2, cbs=[DistillCallback(teacher), SparsifyCallback(.5)])
        assert total_zeros(learn.model) == round(.5*total_weights)
        assert_untouched(teacher, before)

    def test_autocast(self, new_learner, teacher):
        "The teacher runs in the precision of the student's forward pass"
        class Autocasts(Callback):
            order = MixedPrecision.order
            def before_fit(self): self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)
            def before_batch(self): self.autocast.__enter__()
            def after_pred(self): self.learn.pred = self.pred.float()
            def after_loss(self): self.autocast.__exit__(None, None, None)
        types, losses = [], LossNotes()
        teacher.register_forward_hook(lambda m, args, out: types.append(out.dtype))
        new_learner().fit(1, 1e-2, cbs=[Autocasts(), DistillCallback(teacher), losses])
        assert types == [torch.bfloat16]*n_batches
        assert {o[0].dtype for o in losses.seen} == {torch.float32}

    def test_lr_find(self, new_learner, teacher):
        "The search for a learning rate leaves student and teacher as they were"
        before = snapshot(teacher)
        asked = []
        learn = new_learner(cbs=DistillCallback(teacher))
        dense = bits(learn.model)
        handle = teacher.register_forward_hook(lambda *args: asked.append(1))
        learn.lr_find(num_it=12, show_plot=False)
        handle.remove()
        assert asked
        assert_same(bits(learn.model), dense)
        assert_untouched(teacher, before)

    def test_resumes(self, new_learner, teacher):
        "A training continues from a checkpoint as without an interruption, with the schedule of the weight too"
        def _cbs(): return [SparsifyCallback(.8), DistillCallback(teacher, weight=SchedCos(.9, .1))]
        whole = new_learner()
        whole.fit_one_cycle(4, 1e-2, cbs=[*_cbs(), SaveModelCallback(every_epoch=True, with_opt=True)])
        resumed = new_learner().load('model_1', with_opt=True, weights_only=False)
        resumed.fit_one_cycle(4, 1e-2, start_epoch=2, cbs=_cbs())
        assert_same(bits(resumed.model), bits(whole.model))

    def test_validation_in_fit(self, new_learner, teacher):
        "A callback that validates in the middle of a fit does not end the teaching"
        asked = []
        teacher.register_forward_hook(lambda *args: asked.append(1))
        class Validates(Callback):
            def after_train(self): self.learn.validate()
        learn = new_learner(tiny_net())
        learn.fit(2, 1e-2, cbs=[DistillCallback(teacher), Validates()])
        assert len(asked) == 2*n_batches


class TestSaved:
    "A learner is saved without its teacher"
    @no_pickle_warning
    def test_export(self, item_learner, tmp_path):
        class Huge(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.rest = Forked(), nn.Parameter(torch.zeros(1_000_000))
            def forward(self, x): return self.net(x)
        sizes = []
        for cbs in ([], [DistillCallback(Huge())]):
            learn = item_learner(cbs=cbs)
            learn.fit(1, 1e-2)
            learn.export()
            sizes.append((tmp_path/'export.pkl').stat().st_size)
        assert sizes[1] < sizes[0] + 2000
        loaded = load_learner(tmp_path/'export.pkl')
        x, _ = tiny_data()
        with torch.no_grad(): expected = learn.model.eval()(x[:1])
        test = loaded.dls.test_dl([0])
        assert_same(loaded.get_preds(dl=test, act=lambda o: o)[0].as_subclass(torch.Tensor), expected)
        loaded.dls = learn.dls
        with pytest.raises(ValueError, match='saved without its teacher'): silence(loaded).fit(1, 1e-2)

    def test_checkpoint(self, new_learner, teacher, tmp_path):
        learn = new_learner(cbs=DistillCallback(teacher))
        learn.fit(1, 1e-2)
        saved = torch.load(learn.save('model'), weights_only=False)
        assert sorted(saved['model']) == sorted(tiny_net().state_dict())

    def test_deepcopy(self, new_learner, teacher):
        "A copy in memory has the same teacher, which is not copied"
        learn = new_learner(cbs=DistillCallback(teacher))
        again = copy.deepcopy(learn)
        assert again.distill is not learn.distill and again.distill.teacher.model is teacher
        for o in (learn, again): o.fit(1, 1e-2)
        assert_same(bits(learn.model), bits(again.model))

    def test_pickle_in_fit(self, new_learner, teacher):
        "Also in the middle of a fit"
        sizes = []
        cb = DistillCallback(nn.Sequential(teacher, nn.Linear(4, 100_000), nn.Linear(100_000, 4)))
        class Pickles(Callback):
            def after_batch(self): sizes.append(len(pickle.dumps(cb.asked)) + len(pickle.dumps(cb.teacher)))
        new_learner().fit(1, 1e-2, cbs=[cb, Pickles()])
        assert sizes and max(sizes) < 1000


class TestErrors:
    "An error says what was given and what is right, and nothing has been trained"
    def raises(self, learn, message, *args, **kwargs):
        before = [p.detach().clone() for p in learn.model.parameters()]
        with pytest.raises(ValueError, match=message): learn.fit(1, 1e-2, cbs=DistillCallback(*args, **kwargs))
        assert_same(list(map(torch.Tensor.detach, learn.model.parameters())), before)

    def test_other_classes(self, new_learner):
        self.raises(new_learner(), r'student gives predictions of the shape \(8, 4\), and the teacher of \(8, 3\)',
            Forked(3))

    def test_itself(self, new_learner):
        learn = new_learner()
        for given in (learn, learn.model, nn.Sequential(learn.model, nn.Identity())):
            self.raises(learn, 'cannot learn from itself.*deepcopy', given)

    @pytest.mark.parametrize('loss_func,targets,n_out', [
        (MSELossFlat(), lambda y: y.float(), 1), (nn.MSELoss(), lambda y: torch.randn(len(y), 2), 2),
        (BCEWithLogitsLossFlat(), lambda y: nn.functional.one_hot(y, 4).float()*2, 4),
        (nn.BCEWithLogitsLoss(), lambda y: torch.tensor([[1., 1, 0, 0]]).expand(len(y), 4), 4)],
        ids=['MSELossFlat', 'MSELoss', 'BCEWithLogitsLossFlat', 'BCEWithLogitsLoss'])
    def test_no_classes(self, tmp_path, loss_func, targets, n_out):
        x, y = tiny_data()
        items = list(zip(x, targets(y)))
        dls = DataLoaders(DataLoader(items[:36], bs=8), DataLoader(items[36:], bs=8))
        learn = silence(Learner(dls, Forked(n_out), loss_func, path=tmp_path))
        self.raises(learn, 'A teacher needs (predictions with an axis|targets that are classes)', Forked(n_out))

    def test_soft_targets(self, tmp_path, teacher):
        "Probabilities are classes too"
        x, y = tiny_data()
        items = list(zip(x, .9*nn.functional.one_hot(y, 4) + .025))
        dls = DataLoaders(DataLoader(items[:36], bs=8), DataLoader(items[36:], bs=8))
        losses = LossNotes()
        silence(Learner(dls, tiny_net(), nn.CrossEntropyLoss(), path=tmp_path)).fit(1, 1e-2,
            cbs=[DistillCallback(teacher, weight=.5), losses])
        assert all(float(o[0]) != float(o[1]) for o in losses.seen) and len(losses.seen) == n_batches

    @pytest.mark.parametrize('kwargs,message', [
        (dict(weight=1.5), r'in \[0, 1\], got 1.5'), (dict(weight=-.1), r'in \[0, 1\], got -0.1'),
        (dict(weight=math.nan), 'got nan'), (dict(weight=SchedCos(2, 0)), r'in \[0, 1\], got 2'),
        (dict(weight='cos'), "number in .*got 'cos'"), (dict(weight=SchedCos), 'such as SchedCos'),
        (dict(temperature=0), 'above 0, got 0'), (dict(temperature=-1.), 'above 0, got -1'),
        (dict(temperature=math.inf), 'above 0, got inf'), (dict(temperature=math.nan), 'above 0, got nan')])
    def test_arguments(self, teacher, kwargs, message):
        with pytest.raises(ValueError, match=message): DistillCallback(teacher, **kwargs)

    @pytest.mark.parametrize('given', [None, 3, Forked, lambda x: x], ids=['None', 'number', 'class', 'function'])
    def test_no_teacher(self, given):
        with pytest.raises(ValueError, match='Unknown teacher: .*a trained `Learner`'): DistillCallback(given)

    def test_unknown_argument(self, teacher):
        with pytest.raises(TypeError, match="Did you mean 'weight'"): DistillCallback(teacher, alpha=.5)
        with pytest.raises(TypeError, match="Did you mean 'temperature'"): DistillCallback(teacher, T=2)

    @no_pickle_warning
    def test_wrong_file(self, new_learner, tmp_path):
        path = new_learner().save('model', with_opt=False)
        with pytest.raises(ValueError, match='one that `learn.export` wrote'): DistillCallback(path)
        with pytest.raises(FileNotFoundError): DistillCallback(tmp_path/'none.pkl')


### Simulated pruning

def smallest(weights, extra):
    "Which weights are zero in a batch, by a stable sort of all layers; each layer keeps its largest weight"
    flat = torch.cat([w.flatten() for w in weights]).abs()
    n_zeros = int((flat == 0).sum())
    k = n_zeros + round(extra*(len(flat) - n_zeros))
    order = sorted(range(len(flat)), key=lambda i: (float(flat[i]), i))
    zero = torch.zeros(len(flat), dtype=torch.bool)
    zero[order[:k]] = True
    return [z.view_as(w) for z, w in zip(zero.split([w.numel() for w in weights]), weights)]


def weights_of(model): return [m.weight.detach().clone() for m in layers_of(model).values()]


class Phases(Callback):
    "Note the weights before the forward pass, in it, in the backward pass, and before the step"
    order, run_valid = -5, False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append([weights_of(self.model)])
    def after_pred(self): self.seen[-1].append(weights_of(self.model))
    def before_backward(self): self.seen[-1].append(weights_of(self.model))
    def before_step(self): self.seen[-1].append(weights_of(self.model))


class TestSimulatedPruning:
    @pytest.mark.parametrize('extra', [.1, .5])
    @pytest.mark.parametrize('sparsity', [None, .6])
    def test_weights(self, new_learner, extra, sparsity):
        "Forward and backward pass see the smallest as zero and others as they are; before the step, all are as before"
        learn, phases = new_learner(), Phases()
        cbs = []
        if sparsity:
            learn.fit(1, 1e-2, cbs=SparsifyCallback(sparsity))
            cbs = [SparsifyCallback(sparsity)]
        learn.fit(2, 1e-2, cbs=[*cbs, SimulatedPruning(extra), phases])
        assert len(phases.seen) == 2*n_batches
        for before, forward, backward, step in phases.seen:
            expected = [w.masked_fill(z, 0) for w, z in zip(before, smallest(before, extra))]
            assert_same(forward, expected)
            assert_same(backward, expected)
            assert_same(step, before)
        n_pruned = round((sparsity or 0)*total_weights)
        seen = {sum(int((w == 0).sum()) for w in forward) for _, forward, *_ in phases.seen}
        assert seen == {n_pruned + round(extra*(total_weights - n_pruned))}
        assert total_zeros(learn.model) == n_pruned

    def test_by_hand(self, new_learner):
        "The step is that of plain SGD with the gradient of the sparser network, for all weights"
        from fastai.basics import SGD
        learn = new_learner(opt_func=SGD, wd=0.)
        sparser, items = tiny_net().train(), learn.dls.train.dataset
        dense = tiny_net()
        masks = smallest(weights_of(sparser), .3)
        with torch.no_grad():
            for m, z in zip(layers_of(sparser).values(), masks): m.weight[z] = 0
        x, y = (torch.stack(o) for o in zip(*items[:8]))
        nn.functional.cross_entropy(sparser(x), y).backward()
        class One(Callback):
            order = 100
            def after_step(self): raise CancelFitException
        learn.fit(1, .5, cbs=[SimulatedPruning(.3), One()])
        grads = {n: p.grad for n, p in sparser.named_parameters()}
        for n, p in dense.named_parameters():
            torch.testing.assert_close(dict(learn.model.named_parameters())[n], p - .5*grads[n])
        assert all(grads[f'{n}.weight'][z].any() for n, z in zip(layers_of(dense), masks))

    def test_mask_stays(self, new_learner):
        "With `SparsifyCallback`, the mask of an earlier training is the same after each batch"
        learn, masks = new_learner(), Probe(zero_masks)
        learn.fit(2, 1e-2, cbs=SparsifyCallback(.7))
        first = zero_masks(learn.model)
        learn.fit(2, 1e-2, cbs=[SimulatedPruning(.4), SparsifyCallback(.7), masks])
        assert len(masks.seen) == 2*n_batches
        for seen in masks.seen: assert_same(seen, first)

    def test_changes(self, new_learner):
        "It changes the training, and `extra=0` does not, bit for bit"
        trained = {}
        for extra in (None, 0, .3):
            learn = new_learner()
            learn.fit(2, 1e-2, cbs=[] if extra is None else SimulatedPruning(extra))
            trained[extra] = bits(learn.model)
        assert_same(trained[0], trained[None])
        assert not torch.equal(trained[.3]['0.weight'], trained[None]['0.weight'])

    @pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelBackwardException,
        CancelFitException])
    @pytest.mark.parametrize('event', ['forward', 'after_pred', 'after_loss', 'before_backward'])
    @pytest.mark.parametrize('on_learner', [False, True])
    def test_interrupted(self, new_learner, error, event, on_learner):
        "All weights are back, bit for bit, wherever a batch is cancelled or fails, and the next fit is an ordinary one"
        learn = new_learner()
        before, pruned, stops = weights_of(learn.model), [], [True]
        def _raise(*args):
            pruned.append(total_zeros(learn.model))
            if stops: raise error('stop')
        cb, other = SimulatedPruning(.3), Callback() if event == 'forward' else Callback(**{event: _raise})
        if event == 'forward': learn.model[4].register_forward_hook(_raise)
        if on_learner: learn.add_cb(cb)
        cancels = {CancelBatchException, CancelFitException} | ({CancelBackwardException} if 'back' in event else set())
        if error in cancels: learn.fit(1, 0., wd=0., cbs=[other]+[cb]*(not on_learner))
        else:
            with pytest.raises(error): learn.fit(1, 0., wd=0., cbs=[other]+[cb]*(not on_learner))
        assert pruned[0] == round(.3*total_weights)
        assert_same(weights_of(learn.model), before)
        stops.clear()
        phases = Phases()
        learn.fit(1, 1e-2, cbs=[phases, SparsifyCallback(.5)])
        zeros = [[sum(int((w == 0).sum()) for w in o) for o in seen] for seen in phases.seen]
        for start, forward, _, step in zeros:
            assert forward == start + round(.3*(total_weights - start))*on_learner and step == start
        assert total_zeros(learn.model) == round(.5*total_weights)
        assert '_do_one_batch' not in vars(learn)

    def test_accumulation(self, new_learner):
        "Also in batches that make no step"
        learn, phases = new_learner(), Phases()
        learn.fit(1, 1e-2, cbs=[phases, SimulatedPruning(.2), GradientAccumulation(16)])
        for before, forward, *_ in phases.seen:
            assert_same(forward, [w.masked_fill(z, 0) for w, z in zip(before, smallest(before, .2))])
        assert total_zeros(learn.model) == 0 and len(phases.seen) == n_batches

    def test_validation(self, new_learner):
        "Validation, a search and predictions see all weights"
        zeros = []
        class Notes(Callback):
            def after_pred(self):
                if not self.training: zeros.append(total_zeros(self.model))
        learn = new_learner(cbs=[SimulatedPruning(.2), Notes()])
        before = bits(learn.model)
        learn.lr_find(num_it=10, show_plot=False)
        assert_same(bits(learn.model), before)
        learn.fit(1, 1e-2)
        learn.validate(), learn.get_preds()
        assert len(zeros) >= 6 and not any(zeros)

    def test_layers(self, new_learner):
        "Only chosen and trained layers, and one weight of each stays"
        learn, phases = new_learner(), Phases()
        learn.model[3].weight.requires_grad_(False)
        learn.fit(1, 1e-2, cbs=[SimulatedPruning(.9, layers=nn.Conv2d), phases])
        for _, forward, *_ in phases.seen:
            assert [int((w == 0).sum()) for w in forward] == [round(.9*288), 0, 0]
        learn = new_learner()
        learn.model[8].weight.data.mul_(1e-6)
        phases = Phases()
        learn.fit(1, 1e-2, cbs=[SimulatedPruning(.5), phases])
        assert int((phases.seen[0][1][2] != 0).sum()) == 1

    def test_with_teacher(self, new_learner, teacher):
        "Both callbacks at once"
        learn, before = new_learner(), snapshot(teacher)
        learn.fit(2, 1e-2, cbs=[SimulatedPruning(.2), DistillCallback(teacher), SparsifyCallback(.8)])
        assert total_zeros(learn.model) == round(.8*total_weights)
        assert_untouched(teacher, before)

    @pytest.mark.parametrize('extra', [1, -.1, math.nan])
    def test_errors(self, new_learner, extra):
        with pytest.raises(ValueError, match=r'fraction in \[0, 1\)'): SimulatedPruning(extra)
        with pytest.raises(ValueError, match='Unknown layer'): new_learner().fit(1, cbs=SimulatedPruning(.1, '77'))


def test_same_batches():
    "The data of these tests is in the same order in each epoch, as `test_mixed_inputs` needs it"
    first, second = ([b[0] for b in tiny_dls().train] for _ in range(2))
    assert_same(first, second)
