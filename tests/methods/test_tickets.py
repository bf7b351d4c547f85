"Lottery tickets are what training by hand, from the same start and with the same masks, gives"
import pytest, torch
from fastai.basics import Callback, accuracy
from fastai.callback.all import SaveModelCallback
from onecycle_prune.methods.tickets import RewindPoint, find_tickets
from onecycle_prune.sparsifier import Sparsifier
from torch import nn

from helpers import Probe, assert_same, bits
from networks import adam, momentum_sgd, n_batches, n_weights, tiny_learner, tiny_net, total_weights
from reference import layers_of

sparsities = [.5, .8, .9]


def fit(learn, cbs): learn.fit_one_cycle(3, 1e-2, cbs=cbs)


class Log:
    "Keeps what each training begins and ends with; use its methods as `fit` and as `after_round`"
    def __init__(self, fit=fit): self.fit, self.starts, self.ends, self.masks, self.tables = fit, [], [], [], []
    def __call__(self, learn, cbs):
        def _start(cb):
            if len(self.starts) == len(self.ends): self.starts.append(bits(cb.model))
        self.fit(learn, [*cbs, Callback(before_batch=_start)])
        self.ends.append(bits(learn.model))
    def after_round(self, table, sparsifier):
        self.tables.append(table)
        self.masks.append({n: m.clone() for n, m in sparsifier.masks.items()})


@pytest.fixture
def search(new_learner):
    "A function that finds tickets, and returns the learner, the weights of the start, the log and the table"
    def _search(fit=fit, sparsities=sparsities, **kwargs):
        learn, log = new_learner(metrics=accuracy), Log(fit)
        start = bits(learn.model)
        table = find_tickets(learn, log, sparsities, after_round=log.after_round, **kwargs)
        return learn, start, log, table
    return _search


def masked(state, masks):
    "The state with the pruned weights zero, from a plain product"
    return {k: t*masks[k.removesuffix('.weight')] if k.removesuffix('.weight') in masks else t
        for k, t in state.items()}


def smallest(state, pruned, k):
    "The masks of all but the k smallest weights of all layers, pruned ones first; ties do not occur"
    magnitudes = {n: state[f'{n}.weight'].abs().masked_fill(pruned[n], -1) for n in n_weights}
    limit = torch.cat([t.flatten() for t in magnitudes.values()]).sort().values[k-1]
    return {n: t > limit for n, t in magnitudes.items()}


class ByHand(Callback):
    "Multiplies the weights by masks after each step"
    def __init__(self, masks): self.masks = masks
    def after_step(self):
        with torch.no_grad():
            for n, m in self.masks.items(): self.model.get_submodule(n).weight.mul_(m)


class TestTickets:
    def test_masks(self, search):
        "Each round prunes the smallest weights of the training before, exactly as many as asked, and none returns"
        _, _, log, _ = search()
        pruned = {n: torch.zeros_like(m) for n, m in log.masks[0].items()}
        for i, s in enumerate(sparsities):
            expected = smallest(log.ends[i], pruned, round(s*total_weights))
            assert_same(log.masks[i+1], expected)
            assert sum(int((~m).sum()) for m in expected.values()) == round(s*total_weights)
            assert not any((pruned[n] & m).any() for n, m in expected.items())
            pruned = {n: ~m for n, m in expected.items()}

    def test_rewound(self, search):
        "Each training begins with start·mask, also in the statistics of batch norms, and ends with these zeros"
        _, start, log, _ = search()
        assert len(log.starts) == len(log.ends) == 4
        assert (start['1.running_mean'] == 0).all() and (log.ends[0]['1.running_mean'] != 0).any()
        for begins, ends, masks in zip(log.starts, log.ends, log.masks, strict=True):
            assert_same(begins, masked(start, masks))
            assert all(((ends[f'{n}.weight'] != 0) == m).all() for n, m in masks.items())

    @pytest.mark.parametrize('rewind', [1, 2])
    def test_later_point(self, search, rewind, new_learner):
        "With `rewind`, each training begins with the weights after these epochs of the dense training"
        _, _, log, _ = search(rewind=rewind)
        probe = Probe(bits)
        new_learner().fit_one_cycle(3, 1e-2, cbs=probe)
        point = probe.seen[rewind*n_batches - 1]
        for begins, masks in zip(log.starts[1:], log.masks[1:], strict=True): assert_same(begins, masked(point, masks))

    @pytest.mark.parametrize('rewind', [0, 1])
    @pytest.mark.parametrize('opt_func', [momentum_sgd, adam])
    def test_trained(self, tmp_path, rewind, opt_func):
        "Each ticket is a new learner trained by hand from that point with these masks, bit for bit"
        log = Log()
        find_tickets(tiny_learner(tmp_path, opt_func=opt_func), log, sparsities, rewind, log.after_round)
        for begins, ends, masks in list(zip(log.starts, log.ends, log.masks, strict=True))[1:]:
            learn = tiny_learner(tmp_path, opt_func=opt_func)
            learn.model.load_state_dict(begins)
            learn.fit_one_cycle(3, 1e-2, cbs=ByHand(masks), start_epoch=rewind)
            assert_same(bits(learn.model), ends)

    def test_old_optimizer(self, new_learner):
        "The momentum of a training before the search has no effect"
        learners = [new_learner(), new_learner()]
        start = bits(learners[0].model)
        learners[0].fit(1)
        learners[0].model.load_state_dict(start)
        for learn in learners: find_tickets(learn, fit, [.5])
        assert_same(*(bits(o.model) for o in learners))

    def test_table(self, search):
        "The table has a row for each training, and its last row is that of the learner"
        learn, _, log, table = search()
        assert table.columns.tolist() == ['sparsity', 'zeros', 'valid_loss', 'accuracy']
        assert table.sparsity.tolist() == [0, *sparsities]
        assert table.zeros.tolist() == pytest.approx([0, *(round(s*total_weights)/total_weights for s in sparsities)])
        assert_same(bits(learn.model), log.ends[-1])
        assert table.iloc[-1, 2:].tolist() == pytest.approx(list(learn.validate()))
        assert [len(o) for o in log.tables] == [1, 2, 3, 4] and log.tables[-1].equals(table)

    def test_settings(self, search):
        "Other settings are those of `Sparsifier`"
        _, _, log, _ = search(sparsities=[.5], context='local', layers=['0', '3'], granularity='kernel')
        masks = log.masks[-1]
        assert list(masks) == ['0', '3']
        for m in masks.values():
            kernels = m.flatten(2)
            assert (kernels.all(2) | ~kernels.any(2)).all() and kernels.any(2).sum() == m.shape[0]*m.shape[1]//2

    def test_filters(self, search):
        "With filters, biases and norms of pruned filters are zero in the ticket too"
        _, start, log, _ = search(sparsities=[.5], granularity='filter', context='local', layers='0')
        pruned = ~log.masks[1]['0'].flatten(1).any(1)
        assert pruned.sum() == 4
        for state in (log.starts[1], log.ends[1]):
            for k in ('0.weight', '0.bias', '1.weight', '1.bias'): assert (state[k][pruned] == 0).all()
        assert_same(log.starts[1]['1.weight'], start['1.weight']*~pruned)

    def test_movement(self, search):
        "A criterion that compares with the start compares with that of the search"
        _, start, log, _ = search(sparsities=[.5], criteria='movement', context='local')
        for n, m in log.masks[1].items():
            moved = (log.ends[0][f'{n}.weight'] - start[f'{n}.weight']).abs()
            assert moved[m].min() >= moved[~m].max()

    def test_one_number(self, search): assert search(sparsities=.5)[3].sparsity.tolist() == [0, .5]

    def test_zeros_at_start(self, new_learner):
        "Weights that are zero at the start do not count as pruned, and a layer of zeros keeps its masks"
        net = tiny_net()
        with torch.no_grad():
            net[0].weight[:4] = 0
            nn.init.zeros_(net[8].weight)
        learn, log = new_learner(net), Log()
        find_tickets(learn, log, [.5, .8], after_round=log.after_round, context='local')
        for n, m in log.masks[1].items():
            magnitudes = log.ends[0][f'{n}.weight'].abs()
            assert m.sum() == n_weights[n]/2 and magnitudes[m].min() > magnitudes[~m].max()
        for ends, masks in zip(log.ends, log.masks, strict=True):
            for n, m in masks.items(): assert ((ends[f'{n}.weight'] != 0) == m).all()
        assert log.masks[1]['0'][:4].any()

    def test_several_fits(self, search):
        "A way to train may have several fits, if the tickets are rewound to the start"
        def _twice(learn, cbs):
            learn.fit(1, 1e-2, cbs=cbs)
            learn.fit(1, 1e-3, cbs=cbs)
        _, start, log, _ = search(_twice)
        for begins, ends, masks in zip(log.starts, log.ends, log.masks, strict=True):
            assert_same(begins, masked(start, masks))
            assert all(((ends[f'{n}.weight'] != 0) == m).all() for n, m in masks.items())

    def test_best_epoch(self, search):
        "A training that ends with its best epoch ends with a ticket"
        def _best(learn, cbs): learn.fit_one_cycle(3, 1e-1, cbs=[*cbs, SaveModelCallback()])
        *_, table = search(_best)
        assert table.zeros.tolist() == pytest.approx([0, *sparsities], abs=1e-3)

    @pytest.mark.filterwarnings('error')
    def test_silent(self, search): assert len(search(sparsities=[.5])[3]) == 2


class TestInterrupted:
    @pytest.mark.parametrize('event', ['after_step', 'before_step', 'before_batch', 'after_batch', 'before_epoch'])
    def test_zeros(self, new_learner, event):
        "The learner holds the zeros of the round that was interrupted, and all rounds before were reported"
        learn, log, rounds = new_learner(), Log(), []
        start = bits(learn.model)
        def _stop(cb):
            if cb.epoch == 1: raise KeyboardInterrupt
        def _fit(learn, cbs):
            rounds.append(1)
            # The order is before the callback that keeps the masks.
            log(learn, [*cbs, Callback(**{event: _stop})] if len(rounds) == 3 else cbs)
        with pytest.raises(KeyboardInterrupt): find_tickets(learn, _fit, sparsities, after_round=log.after_round)
        assert len(log.masks) == 2 and log.tables[-1].sparsity.tolist() == [0, .5]
        masks = Sparsifier(learn).masks
        assert sum(int((~m).sum()) for m in masks.values()) == round(.8*total_weights)
        assert not any((m & ~log.masks[1][n]).any() for n, m in masks.items())
        changed = learn.model[0].weight != start['0.weight']
        assert changed[masks['0']].any()

    def test_dense(self, new_learner):
        "If the dense training is interrupted, the learner holds its weights"
        learn = new_learner()
        start = bits(learn.model)
        def _stop(cb):
            if cb.epoch == 1: raise KeyboardInterrupt
        def _fit(learn, cbs): fit(learn, [*cbs, Callback(before_epoch=_stop)])
        with pytest.raises(KeyboardInterrupt): find_tickets(learn, _fit)
        assert (learn.model[0].weight != start['0.weight']).all()


def never(learn, cbs): raise AssertionError('a training began')


class TestErrors:
    @pytest.mark.parametrize('wrong', [
        [.9, .5], [.5, .5], [0., .5], [.5, 1.], [-.1], [1.5], [], [float('nan')], ['.5'], 50, {'0': .5}], ids=str)
    def test_sparsities(self, new_learner, wrong):
        with pytest.raises(ValueError, match='rising numbers between 0 and 1, got'):
            find_tickets(new_learner(), never, wrong)

    @pytest.mark.parametrize('rewind', [-1, .5, '1', None])
    def test_rewind(self, new_learner, rewind):
        with pytest.raises(ValueError, match=f'number of epochs, 0 or more, got {rewind!r}'):
            find_tickets(new_learner(), never, rewind=rewind)

    @pytest.mark.parametrize('criterion', ['taylor', 'updating_movement'])
    def test_criteria(self, new_learner, criterion):
        with pytest.raises(ValueError, match=f"'{criterion}' ranks by the last step.*'large_final'"):
            find_tickets(new_learner(), never, criteria=criterion)

    @pytest.mark.parametrize('criterion', ['snip', 'wanda'])
    def test_criteria_before_a_training(self, new_learner, criterion):
        with pytest.raises(ValueError, match=f"'{criterion}' scores a network before its training.*'large_final'"):
            find_tickets(new_learner(), never, criteria=criterion)

    @pytest.mark.parametrize('wrong,error,match', [
        (dict(criteria='magnitud'), ValueError, "Did you mean 'magnitude'"),
        (dict(granularity='wieght'), ValueError, "Did you mean 'weight'"),
        (dict(layers='9'), ValueError, '9'), (dict(schedul='cos'), TypeError, 'schedul')])
    def test_settings(self, new_learner, wrong, error, match):
        learn = new_learner()
        start = bits(learn.model)
        with pytest.raises(error, match=match): find_tickets(learn, never, **wrong)
        assert_same(bits(learn.model), start)

    @pytest.mark.parametrize('rewind', [3, 7])
    def test_too_late(self, new_learner, rewind):
        "A point at or after the end is refused before any batch, and the learner trains afterwards"
        learn = new_learner()
        start = bits(learn.model)
        with pytest.raises(ValueError, match=f'rewind={rewind} lies at or after.*3 epoch'):
            find_tickets(learn, fit, rewind=rewind)
        assert_same(bits(learn.model), start)
        assert len(find_tickets(learn, fit, [.5], 2)) == 2

    def test_several_fits(self, new_learner):
        def _twice(learn, cbs):
            learn.fit(2, 1e-2, cbs=cbs)
            learn.fit(2, 1e-2, cbs=cbs)
        with pytest.raises(ValueError, match='single fit'): find_tickets(new_learner(), _twice, rewind=1)

    def test_unused(self, new_learner):
        "A function that drops the callbacks gets an error after the dense training, or after the first ticket"
        def _drops(learn, cbs): learn.fit(1)
        def _drops_later(learn, cbs): learn.fit(1, cbs=[o for o in cbs if isinstance(o, RewindPoint)])
        for wrong in (_drops, _drops_later):
            with pytest.raises(ValueError, match='has to give its callbacks'): find_tickets(new_learner(), wrong)


def test_layers(new_learner):
    "All layers that can be pruned are, by default"
    learn = new_learner()
    find_tickets(learn, fit, [.9], context='local')
    shares = {n: float((m.weight == 0).double().mean()) for n, m in layers_of(learn.model).items()}
    assert shares == pytest.approx({n: round(.9*k)/k for n, k in n_weights.items()})
