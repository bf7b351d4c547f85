"""Test the tables of the page on moving a script over.

In each row, the code on the right does what the code on the left asks for. The rows are read from the notebook, so the
page and its test cannot differ. Counts and masks are computed from the weights alone."""
import inspect, re
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from fastcore.nbio import read_nb
from onecycle_prune import all as ours
from torch import nn
from torch.nn.utils import prune

from networks import tiny_net
from reference import assert_counts, count_groups, layers_of, zero_masks

page = Path(__file__).parent.parent/'nbs'/'howto'/'05_move_over.ipynb'


def rows(heading: str) -> list[tuple[str, str]]:
    "The rows of code of the table under `heading`, as pairs of left and right."
    text = '\n'.join(c.source for c in read_nb(page).cells if c.cell_type == 'markdown')
    section = text.split(f'## {heading}\n')[1].split('\n## ')[0]
    found = re.findall(r'^\|`(.+?)`\|`(.+?)`\|$', section, re.M)
    assert len(found) >= 9
    return found


def run(code: str, **names):
    "The value of `code`, evaluated with all names of the package and with `names`."
    return eval(code, dict(vars(ours), nn=nn) | names)


### fasterai, version 0.4.1

# Names of fasterai that `onecycle_prune.all` does not export.
fasterai_names = {name: name for name in ('cos', 'random', 'squared_final', 'small_init', 'sched_agp')}


def asked_by_callback(sparsity, granularity, context, criteria, schedule, lth=False, rewind_epoch=0, reset_end=False,
                      save_tickets=False, model=None, round_to=None, nm=False, layer_type=nn.Conv2d):
    "Replace fasterai's callback: return what it is asked for."
    return SimpleNamespace(**locals())


class AskedBySparsifier:
    "Replace fasterai's sparsifier: return what it is asked for."
    def __init__(self, model, granularity, context, criteria, nm=False, layer_type=nn.Conv2d, data=None):
        self.kwargs = locals()

    def sparsify_model(self, sparsity, round_to=None):
        kwargs = {k: v for k, v in self.kwargs.items() if k not in ('self', 'data')}
        return asked_by_callback(sparsity, schedule=None, **kwargs)


def assert_done(asked: SimpleNamespace, net: nn.Module):
    "Check that the layers of `net` that were asked for are as sparse as asked, and that no others are sparse."
    modules = list((asked.model or net).modules())
    inside = [n for n, m in layers_of(net).items() if isinstance(m, asked.layer_type) and any(m is o for o in modules)]
    targets = asked.sparsity if isinstance(asked.sparsity, dict) else dict.fromkeys(inside, asked.sparsity)
    counts = count_groups(net, asked.granularity)
    if asked.context == 'global': assert_counts([{n: counts[n] for n in targets}], [asked.sparsity], 'global')
    else:
        for n, s in targets.items(): assert_counts([{n: counts[n]}], [s])
    for n, m in layers_of(net).items(): assert (m.weight == 0).any() == (n in targets)
    if asked.nm:
        for n in targets: assert (layers_of(net)[n].weight.unflatten(1, (-1, 4)).count_nonzero(2) == 2).all()


@pytest.mark.parametrize('theirs,here', rows('From fasterai'))
def test_fasterai(new_learner, theirs, here):
    "A fasterai script that is changed as in the table reaches the sparsity that it asked for."
    learn = new_learner()
    names = dict(learn=learn, net=learn.model)
    asked = run(theirs, **names, **fasterai_names, SparsifyCallback=asked_by_callback, Sparsifier=AskedBySparsifier,
                Schedule=lambda *args, **kwargs: None)
    moved = run(here, **names)
    if isinstance(moved, ours.SparsifyCallback): learn.fit_one_cycle(2, 1e-2, cbs=moved)
    assert_done(asked, learn.model)


def test_fasterai_signature():
    "The replacements take the same arguments as fasterai's own, with the same defaults."
    sparse = pytest.importorskip('fasterai.sparse.all')
    pairs = [(asked_by_callback, sparse.SparsifyCallback),
             (AskedBySparsifier, sparse.Sparsifier),
             (AskedBySparsifier.sparsify_model, sparse.Sparsifier.sparsify_model)]
    for replacement, original in pairs:
        given, expected = ([(p.name, p.default) for p in inspect.signature(o).parameters.values()]
                           for o in (replacement, original))
        assert given == expected


### torch.nn.utils.prune

@pytest.mark.parametrize('theirs,here', rows('From torch.nn.utils.prune'))
def test_torch(theirs, here):
    "A call of `torch.nn.utils.prune` and its replacement prune the same weights, or as many if they are random."
    nets = [tiny_net() for _ in range(2)]
    for net, code in zip(nets, (theirs, here)): run(code, net=net, m=net[3], prune=prune)
    expected, found = map(zero_masks, nets)
    assert any(m.any() for m in found.values())
    for n, m in expected.items():
        if 'random' in theirs: assert m.sum() == found[n].sum()
        else: assert torch.equal(m, found[n])
