"""The tables of the page on moving a script over, row by row: what stands on the right does what the left has promised.

The rows are read from the notebook, so that the page and its test cannot part. Counts and masks are taken from the weights alone."""
import inspect, re
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from fastcore.nbio import read_nb
from onecycle_prune import all as ours
from torch import nn
from torch.nn.utils import prune

from conftest import tiny_net
from test_training import assert_counts, groups, layers, zero_masks

page = Path(__file__).parent.parent/'nbs'/'howto'/'05_move_over.ipynb'


def rows(heading):
    "The rows of code of the table under `heading`: pairs of left and right"
    text = '\n'.join(c.source for c in read_nb(page).cells if c.cell_type == 'markdown')
    section = text.split(f'## {heading}\n')[1].split('\n## ')[0]
    found = re.findall(r'^\|`(.+?)`\|`(.+?)`\|$', section, re.M)
    assert len(found) >= 9
    return found


def run(code, **names):
    "The value of `code`, with all names of the package"
    return eval(code, dict(vars(ours), nn=nn) | names)


### fasterai, version 0.4.1

def promise(sparsity, granularity, context, criteria, schedule, lth=False, rewind_epoch=0, reset_end=False, save_tickets=False, model=None,
    round_to=None, nm=False, layer_type=nn.Conv2d):
    "In place of its callback: what was asked of it"
    return SimpleNamespace(**locals())


class Promise:
    "In place of its sparsifier"
    def __init__(self, model, granularity, context, criteria, nm=False, layer_type=nn.Conv2d, data=None): self.kwargs = locals()
    def sparsify_model(self, sparsity, round_to=None):
        return promise(sparsity, schedule=None, **{k: v for k, v in self.kwargs.items() if k not in ('self', 'data')})


def assert_promised(asked, net):
    "In `net`, the layers that were asked for are as sparse as was asked, and no others"
    inside = [n for n, m in layers(net).items() if isinstance(m, asked.layer_type) and any(m is o for o in (asked.model or net).modules())]
    targets = asked.sparsity if isinstance(asked.sparsity, dict) else dict.fromkeys(inside, asked.sparsity)
    counts = groups(net, asked.granularity)
    if asked.context == 'global': assert_counts([{n: counts[n] for n in targets}], [asked.sparsity], 'global')
    else:
        for n, s in targets.items(): assert_counts([{n: counts[n]}], [s])
    for n, m in layers(net).items(): assert (m.weight == 0).any() == (n in targets)
    if asked.nm:
        for n in targets: assert (layers(net)[n].weight.unflatten(1, (-1, 4)).count_nonzero(2) == 2).all()


@pytest.mark.parametrize('theirs,here', rows('From fasterai'))
def test_fasterai(new_learner, theirs, here):
    "A script of fasterai's that is moved by the table gives the sparsity that it asked for"
    learn = new_learner()
    names = dict(learn=learn, net=learn.model)
    asked = run(theirs, **names, SparsifyCallback=promise, Sparsifier=Promise, Schedule=lambda *args, **kwargs: None,
        random='random', squared_final='squared_final', small_init='small_init')
    moved = run(here, **names)
    if isinstance(moved, ours.SparsifyCallback): learn.fit_one_cycle(2, 1e-2, cbs=moved)
    assert_promised(asked, learn.model)


def test_fasterai_signature():
    "The stand-ins take what fasterai takes, with the same defaults"
    sparse = pytest.importorskip('fasterai.sparse.all')
    for stand_in, theirs in (promise, sparse.SparsifyCallback), (Promise, sparse.Sparsifier), (Promise.sparsify_model, sparse.Sparsifier.sparsify_model):
        given, true = ([(p.name, p.default) for p in inspect.signature(o).parameters.values()] for o in (stand_in, theirs))
        assert given == true


### torch.nn.utils.prune

@pytest.mark.parametrize('theirs,here', rows('From torch.nn.utils.prune'))
def test_torch(theirs, here):
    "A call of torch.nn.utils.prune and what the table puts in its place zero the same weights; by chance, as many"
    nets = [tiny_net() for _ in range(2)]
    for net, code in zip(nets, (theirs, here)): run(code, net=net, m=net[3], prune=prune)
    before, after = map(zero_masks, nets)
    assert any(m.any() for m in after.values())
    for n, m in before.items(): assert m.sum() == after[n].sum() if 'random' in theirs else torch.equal(m, after[n])
