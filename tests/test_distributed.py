"""Pruning in trainings with several processes, each with its part of the batches.

One launch of two processes on the CPU trains every case and saves what it saw; the tests read it."""
import os, subprocess, sys
from datetime import timedelta
from pathlib import Path

import pytest, torch
from fastai.basics import Callback, rank_distrib
from fastai.callback.all import SaveModelCallback
from onecycle_prune.callback import SparsifyCallback
from onecycle_prune.regrow import Exchange, Soft
from torch import distributed

pytest.importorskip('accelerate')  # `fastai.distributed` needs it
from fastai.distributed import DistributedDL

from helpers import Probe, assert_same, before_training_batches, bits
from networks import tiny_learner, tiny_net
from reference import assert_counts, count_groups, curve, layers_of

area = 'Many processes'
cases = [(criterion, context) for criterion in ('large_final', 'random', 'movement') for context in ('local', 'global')]
cases += [('large_final', context, 'structured') for context in ('local', 'global')]
cases += [(o, context) for o in ('large_final', 'movement') for context in ('erk', 'lamp', 'multiply_adds')]
cases += [('snip', 'global')]
regrowths = dict(gradient=Exchange('gradient', every=1), any=Exchange('random', every=1), soft=Soft())
epochs = 4
n_batches = 3  # of the five batches of `tiny_dls`, each process has three
runs = dict(whole=0, resumed=2)  # the first epoch of each


def as_ints(net):
    "A copy of the parameters as integers, in which -0 differs from 0"
    return {n: p.detach().clone().view(torch.int32) for n, p in net.named_parameters()}


def train(learn, criterion='large_final', context='local', granularity='weight', regrow=None, cbs=(), **kwargs):
    "Train with pruning; return the weights before, the masks before each epoch, the state after each batch, the end"
    net, masks, inputs = learn.model, [], []
    cb = SparsifyCallback(.9, granularity, context, criterion, regrow=regrow)
    before, group = as_ints(net), 'weight' if granularity == 'weight' else 'filter'
    def note_first(self):
        if self.training and self.iter == 0: masks.append(cb.sparsifier.masks)
    note = Callback(after_pred=note_first)
    probe = Probe(lambda _: dict(masks=cb.sparsifier.masks, weights=as_ints(net), counts=count_groups(net, group)))
    see = before_training_batches(lambda learn: inputs.append(learn.x.clone()))
    learn.fit_one_cycle(epochs, 1e-2, cbs=[cb, note, probe, see, *cbs], **kwargs)
    return dict(before=before, masks=masks, batches=probe.seen, end=bits(learn.model), unwrapped=learn.model is net,
        inputs=inputs)


### What each of the two processes does

def broadcast_on_cpu(self, t, rank):
    "In place of fastai's own, which needs nccl and a GPU"
    distributed.broadcast(t := torch.tensor(t), rank)
    return t.tolist()


def work(folder):
    "Train every case, whole and from a checkpoint of the first process; weights and seeds of the processes differ"
    distributed.init_process_group('gloo', timeout=timedelta(seconds=60))  # a process that waits in vain fails
    DistributedDL._broadcast = broadcast_on_cpu
    rank = rank_distrib()
    for case in cases:
        name = '-'.join(case)
        learn, other = tiny_learner(folder/str(rank)/name), tiny_learner(folder/'0'/name)
        torch.manual_seed(10+rank)
        for m in layers_of(learn.model).values(): m.reset_parameters()
        torch.manual_seed(rank)
        save = SaveModelCallback(every_epoch=True, with_opt=True)
        with learn.distrib_ctx(sync_bn=False, cpu=True): whole = train(learn, *case, cbs=[save])
        other.load(f"model_{runs['resumed']-1}", with_opt=True, weights_only=False)
        torch.manual_seed(20+rank)
        with other.distrib_ctx(sync_bn=False, cpu=True): resumed = train(other, *case, start_epoch=runs['resumed'])
        torch.save(dict(case=case, whole=whole, resumed=resumed), folder/str(rank)/f'{name}.seen')
    for name, regrow in regrowths.items():
        learn = tiny_learner(folder/str(rank)/name)
        torch.manual_seed(rank)
        with learn.distrib_ctx(sync_bn=False, cpu=True): seen = train(learn, regrow=regrow)
        torch.save(seen, folder/str(rank)/f'{name}.seen')
    distributed.destroy_process_group()


### What they saw

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with the files of the first process in its folder 0, and those of the second in 1"
    folder = tmp_path_factory.mktemp('processes')
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=os.pathsep.join(sys.path))
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', __file__, str(folder)]
    res = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=200)
    assert res.returncode == 0, res.stdout + res.stderr
    return folder


@pytest.fixture(params=cases, ids='-'.join)
def ranks(folder, request):
    "What each process saw in one case"
    return [torch.load(folder/r/f"{'-'.join(request.param)}.seen") for r in '01']


def assert_exact(seen, context, n=n_batches, skip=0):
    "Counts are exact after each batch, with `n` batches in an epoch, of a training that starts after `skip` epochs"
    counts, sparsities = [b['counts'] for b in seen['batches']], curve('one_cycle', .9, n*epochs)[n*skip:]
    if context != 'multiply_adds': return assert_counts(counts, sparsities, context)
    positions = {'0': 16, '3': 4, '8': 1}  # of the outputs of `tiny_net`
    def cost(i, o): return sum(n*o[k][i] for k, n in positions.items())
    for o, s in zip(counts, sparsities, strict=True): assert 0 <= s*cost(1, o) - cost(0, o) < 16


@pytest.mark.slow
@pytest.mark.parametrize('name', regrowths)
def test_regrowth(folder, name):
    "Where weights return, they are the same in both processes, also if any may return"
    seen = [torch.load(folder/r/f'{name}.seen') for r in '01']
    assert_same(seen[0]['batches'], seen[1]['batches'])
    masks = [b['masks'] for b in seen[0]['batches']]
    assert sum(int((b[n] & ~a[n]).sum()) for a, b in zip(masks, masks[1:]) for n in a) > 0
    for mask, s in zip(masks, curve('one_cycle', .9, n_batches*epochs), strict=True):
        for o in mask.values(): assert int((~o).sum()) == min(round(s*o.numel()), o.numel()-1)


@pytest.mark.slow
@pytest.mark.parametrize('run', runs)
def test_processes_agree(ranks, run):
    "After every batch, both processes have the same masks and the same weights"
    for k in ('masks', 'batches'): assert_same(ranks[0][run][k], ranks[1][run][k])


@pytest.mark.slow
def test_processes_start_differently(ranks):
    "Before the training, the weights of the processes differ"
    for n in '038': assert not torch.equal(*(o['whole']['before'][f'{n}.weight'] for o in ranks))


@pytest.mark.slow
@pytest.mark.parametrize('run', runs)
def test_exact(ranks, run):
    "Counts are exact after every batch, in both processes"
    for o in ranks: assert_exact(o[run], o['case'][1], skip=runs[run])


@pytest.mark.slow
def test_end(ranks):
    "At the end each process has its own model, with its usual keys and the weights of the last batch"
    for o in (o[run] for o in ranks for run in runs):
        assert o['unwrapped'] and list(o['end']) == list(tiny_net().state_dict())
        for n, w in o['batches'][-1]['weights'].items(): assert torch.equal(o['end'][n].view(torch.int32), w)


@pytest.mark.slow
@pytest.mark.parametrize('run', runs)
def test_batchnorm_statistics(ranks, run):
    "Both processes end with the averages over the batches of both, for the weights that are left"
    ends = [{k: v for k, v in o[run]['end'].items() if 'running' in k} for o in ranks]
    assert_same(*ends)
    conv, inputs = tiny_net()[0], [x for o in ranks for x in o[run]['inputs'][-n_batches:]]
    conv.load_state_dict({k: ranks[0][run]['end'][f'0.{k}'] for k in ('weight', 'bias')})
    outputs = [conv(x).transpose(0, 1).flatten(1) for x in inputs]
    mean, var = (torch.stack([stat(o, 1) for o in outputs]).mean(0) for stat in (torch.mean, torch.var))
    expected = dict(mean=mean, var=var.where(var > 1e-8, mean**2))  # that of a constant channel
    for name, stat in expected.items():
        torch.testing.assert_close(ends[0][f'1.running_{name}'], stat, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_random_scores(folder):
    "Both processes use the random scores of the first one, though their seeds differ"
    gen = torch.Generator().manual_seed(0)
    drawn = {n: torch.rand(m.weight.shape, generator=gen) for n, m in layers_of(tiny_net()).items()}
    kept = {n: t > t.flatten().kthvalue(round(.9*t.numel())).values for n, t in drawn.items()}
    for rank in '01': assert_same(torch.load(folder/rank/'random-local.seen')['whole']['batches'][-1]['masks'], kept)


@pytest.mark.slow
def test_resume_on_two(ranks):
    "From a checkpoint of the first process, both continue bit for bit"
    for whole, resumed in ((o['whole'], o['resumed']) for o in ranks):
        assert_same(resumed['masks'], whole['masks'][runs['resumed']:])
        assert_same(resumed['batches'], whole['batches'][runs['resumed']*n_batches:])
        assert_same(resumed['end'], whole['end'])


@pytest.mark.slow
def test_resume_on_one(folder, ranks):
    "From the same checkpoint, one process alone continues with its own number of batches"
    case, whole, start = ranks[0]['case'], ranks[0]['whole'], runs['resumed']
    learn = tiny_learner(folder/'0'/'-'.join(case)).load(f'model_{start-1}', with_opt=True, weights_only=False)
    alone = train(learn, *case, start_epoch=start)
    assert_same(alone['masks'][0], whole['masks'][start])
    assert_exact(alone, case[1], n=5, skip=start)


@pytest.mark.slow
def test_files(folder, ranks):
    "Only the first process writes checkpoints, and the memory of a criterion that has one"
    def files(rank): return {p.name for p in (folder/rank/'-'.join(ranks[0]['case'])).rglob('*.pth')}
    memory = set() if ranks[0]['case'][0] == 'large_final' else {'sparsity_memory.pth'}
    assert files('0') == {f'model_{i}.pth' for i in range(epochs)} | memory and not files('1')


### One process with `DataParallel`

@pytest.mark.skipif(torch.cuda.is_available(), reason='with a GPU, it needs the model there')
@pytest.mark.parametrize('context', ['local', 'global'])
def test_data_parallel(tmp_path, context):
    "DataParallel on a CPU: the training is bit for bit the one without it, and the model is unwrapped at the end"
    seen = train(tiny_learner(tmp_path).to_parallel(), context=context)
    assert_exact(seen, context, n=5)
    assert_same(seen, train(tiny_learner(tmp_path), context=context))


if __name__ == '__main__': work(Path(sys.argv[1]))
