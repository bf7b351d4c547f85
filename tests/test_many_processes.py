"""The promises of pruning, kept where several processes train one network, each on its part of the batches.

One launch of two processes on the CPU trains every case and writes down what was seen; the tests read it."""
import os, subprocess, sys
from datetime import timedelta
from pathlib import Path

import pytest, torch
from fastai.basics import Callback, Learner, rank_distrib
from fastai.callback.all import SaveModelCallback
from onecycle_prune.all import *
from torch import distributed, nn

pytest.importorskip('accelerate')  # without which there is no `fastai.distributed`
from fastai.distributed import DistributedDL

from conftest import assert_same, bits, hush, quick_sgd, tiny_dls, tiny_net
from test_training import Probe, assert_counts, groups, layers, progress

area = 'Many processes'
cases = [(criterion, context) for criterion in ('large_final', 'random', 'movement') for context in ('local', 'global')]
epochs, n_batches = 4, 3  # of the five batches of `tiny_dls`, each process has three
runs = dict(whole=0, resumed=2)  # the first epoch of each


def tiny_learner(path): return hush(Learner(tiny_dls(), tiny_net(), nn.CrossEntropyLoss(), opt_func=quick_sgd, path=path))


def as_ints(net): return {n: p.detach().clone().view(torch.int32) for n, p in net.named_parameters()}  # -0 is not 0 then


def train(learn, criterion='large_final', context='local', cbs=(), **kwargs):
    "Train with pruning, and return the weights before, the masks that each epoch begins with, what is there after each batch, and the end"
    net, cb, before, masks = learn.model, SparsifyCallback(.9, context=context, criteria=criterion), as_ints(learn.model), []
    note = Callback(before_train=lambda self: masks.append(cb.sparsifier.masks))
    probe = Probe(lambda _: dict(masks=cb.sparsifier.masks, weights=as_ints(net), counts=groups(net, 'weight')))
    learn.fit_one_cycle(epochs, 1e-2, cbs=[cb, note, probe, *cbs], **kwargs)
    return dict(before=before, masks=masks, batches=probe.seen, end=bits(learn.model), unwrapped=learn.model is net)


### What each of the two processes does

def broadcast_on_cpu(self, t, rank):
    "In place of fastai's own, which is for nccl, and needs a GPU"
    distributed.broadcast(t := torch.tensor(t), rank)
    return t.tolist()


def work(folder):
    "Train every case, as a whole and from a checkpoint of the first process; the processes begin with other weights and random numbers"
    distributed.init_process_group('gloo', timeout=timedelta(seconds=60))  # one that waits in vain fails
    DistributedDL._broadcast = broadcast_on_cpu
    rank = rank_distrib()
    for case in cases:
        name = '-'.join(case)
        learn, rest = tiny_learner(folder/str(rank)/name), tiny_learner(folder/'0'/name)
        torch.manual_seed(10+rank)
        for m in layers(learn.model).values(): m.reset_parameters()
        torch.manual_seed(rank)
        with learn.distrib_ctx(sync_bn=False, cpu=True): whole = train(learn, *case, [SaveModelCallback(every_epoch=True, with_opt=True)])
        rest.load(f"model_{runs['resumed']-1}", with_opt=True, weights_only=False)
        torch.manual_seed(20+rank)
        with rest.distrib_ctx(sync_bn=False, cpu=True): resumed = train(rest, *case, start_epoch=runs['resumed'])
        torch.save(dict(case=case, whole=whole, resumed=resumed), folder/str(rank)/f'{name}.seen')
    distributed.destroy_process_group()


### What they saw

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Where the first process has its files in the folder 0, and the second in 1"
    folder = tmp_path_factory.mktemp('processes')
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=os.pathsep.join(sys.path))
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', __file__, str(folder)]
    res = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=200)
    assert res.returncode == 0, res.stdout + res.stderr
    return folder


@pytest.fixture(params=cases, ids='-'.join)
def ranks(folder, request): return [torch.load(folder/r/f"{'-'.join(request.param)}.seen") for r in '01']


def assert_exact(o, context, n=n_batches, skip=0):
    "After each batch, with `n` of them in an epoch and the first `skip` epochs left out"
    steps = [.9*progress['one_cycle']((i+1)/(n*epochs)) for i in range(n*skip, n*epochs)]
    assert_counts([b['counts'] for b in o['batches']], steps, context)


@pytest.mark.parametrize('run', runs)
def test_processes_agree(ranks, run):
    "After every batch they have the same masks and the same weights"
    for k in ('masks', 'batches'): assert_same(ranks[0][run][k], ranks[1][run][k])


def test_processes_began_apart(ranks):
    "What they agree on they had to find: before the training their weights differ"
    for n in '038': assert not torch.equal(*(o['whole']['before'][f'{n}.weight'] for o in ranks))


@pytest.mark.parametrize('run', runs)
def test_exact(ranks, run):
    "Counts are exact after every batch, in each"
    for o in ranks: assert_exact(o[run], o['case'][1], skip=runs[run])


def test_end(ranks):
    "Each has its own model back, with the plain keys and the weights of the last batch"
    for o in (o[run] for o in ranks for run in runs):
        assert o['unwrapped'] and list(o['end']) == list(tiny_net().state_dict())
        for n, w in o['batches'][-1]['weights'].items(): assert torch.equal(o['end'][n].view(torch.int32), w)


def test_drawn_once(folder):
    "The numbers of 'random' are those of the first process, in both, though each would have drawn its own"
    numbers = torch.Generator().manual_seed(0)
    drawn = {n: torch.rand(m.weight.shape, generator=numbers) for n, m in layers(tiny_net()).items()}
    kept = {n: t > t.flatten().kthvalue(round(.9*t.numel())).values for n, t in drawn.items()}
    for r in '01': assert_same(torch.load(folder/r/'random-local.seen')['whole']['batches'][-1]['masks'], kept)


def test_resume_on_two(ranks):
    "From a checkpoint of the first process both go on, bit for bit as if nothing had happened"
    for whole, resumed in ((o['whole'], o['resumed']) for o in ranks):
        assert_same(resumed['masks'], whole['masks'][runs['resumed']:])
        assert_same(resumed['batches'], whole['batches'][runs['resumed']*n_batches:])
        assert_same(resumed['end'], whole['end'])


def test_resume_on_one(folder, ranks):
    "One process alone goes on from it as well, with its own number of batches"
    case, whole, start = ranks[0]['case'], ranks[0]['whole'], runs['resumed']
    learn = tiny_learner(folder/'0'/'-'.join(case)).load(f'model_{start-1}', with_opt=True, weights_only=False)
    alone = train(learn, *case, start_epoch=start)
    assert_same(alone['masks'][0], whole['masks'][start])
    assert_exact(alone, case[1], n=5, skip=start)


def test_files(folder, ranks):
    "Only the first process writes: the checkpoints, and the memory of a criterion that has one"
    def files(rank): return {p.name for p in (folder/rank/'-'.join(ranks[0]['case'])).rglob('*.pth')}
    memory = set() if ranks[0]['case'][0] == 'large_final' else {'sparsity_memory.pth'}
    assert files('0') == {f'model_{i}.pth' for i in range(epochs)} | memory and not files('1')


### One process with `DataParallel`

@pytest.mark.skipif(torch.cuda.is_available(), reason='it wants the model on a GPU where there is one')
@pytest.mark.parametrize('context', ['local', 'global'])
def test_to_parallel(tmp_path, context):
    "DataParallel, which passes through on a CPU: the training is the one without it, and leaves the model unwrapped, with the plain keys"
    seen = train(tiny_learner(tmp_path).to_parallel(), context=context)
    assert_exact(seen, context, n=5)
    assert_same(seen, train(tiny_learner(tmp_path), context=context))


if __name__ == '__main__': work(Path(sys.argv[1]))
