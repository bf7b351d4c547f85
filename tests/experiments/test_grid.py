"The grid: however it is interrupted, killed, shared or continued, each training is done once and as its record says."
import json, os, signal, subprocess, sys, time, warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import onecycle_prune.experiments.data as data, onecycle_prune.experiments.grid as compare, pytest, torch
from onecycle_prune.batchnorm import estimate_batchnorms
from onecycle_prune.experiments.grid import Run, grid, make_record, train
from onecycle_prune.experiments.data import get_dls
from onecycle_prune.experiments.analysis import read_runs
from onecycle_prune.experiments.networks import get_arch
from onecycle_prune.experiments.records import append_record, read_records
from torch import nn
from torch.utils.data import TensorDataset

from reference import layers_of

run = Run('resnet18_cifar_quarter', 'digits', 100, 8, 1, 0,
    'one_cycle', .9, 'local', 'all', 'large_final', 20, 3e-3, .01, False, False, False, 0., 12)
args = ('--archs resnet18_cifar_quarter --images 100 --bs 20 --schedules dense,one_cycle --sparsities .9 --epochs 1 '
        '--seeds 0,1').split()
# The script that pip writes for an entry of console_scripts
code = '''import sys
from onecycle_prune.experiments.grid import compare
if __name__ == "__main__": sys.exit(compare())
'''


@pytest.fixture
def start(tmp_path):
    "A function that starts the console command in a folder with a space in its name"
    script, place = tmp_path/'ocp-compare', tmp_path/'a place'
    script.write_text(code)
    place.mkdir()
    env = os.environ | dict(PYTHONIOENCODING='utf-8', PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    def _start(*more):
        return subprocess.Popen([sys.executable, script, *args, '--out', 'my runs.jsonl', *more], cwd=place, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')
    _start.out = place/'my runs.jsonl'
    return _start


def settings(r): return r['schedule'], r['seed']


every = {(s, i) for s in ('dense', 'one_cycle') for i in (0, 1)}


def test_killed_and_continued(start):
    "What was recorded before the kill stays as it is, and the rest is done once"
    process = start()
    while len(read_records(start.out)) < 1 and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = start.out.read_text()
    n = len(read_records(start.out))
    assert 1 <= n < 4
    with start.out.open('a') as f: f.write('{"arch": "resn')  # as a full disk leaves it
    printed, warned = start().communicate(timeout=300)
    assert printed.splitlines()[-1] == '0 trainings remain'
    assert 'resnet18_cifar_quarter, digits, local, all, large_final, seeds: 2' in printed
    assert '\r' not in printed and 'Warning' not in warned
    records = read_records(start.out)
    assert start.out.read_text().startswith(before) and len(records) == 4 and {settings(r) for r in records} == every
    assert {r['state'] for r in records} == {'done'}


writer = """
import sys, time
from pathlib import Path
from onecycle_prune.experiments.records import append_record
folder, name = Path(sys.argv[1]), sys.argv[2]
(folder/name).touch()
while len([*folder.glob('?')]) < 2: time.sleep(.001)
for i in range(1000): append_record(folder/'runs.jsonl', dict(by=name, i=i, text=name*5000))
"""


def test_two_write_one_file(tmp_path):
    "Two processes start to write at the same moment: each record is on a line of its own, and no line is empty"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    for p in [subprocess.Popen([sys.executable, '-c', writer, tmp_path, name], env=env) for name in 'xy']:
        assert p.wait(120) == 0
    records = [json.loads(line) for line in (tmp_path/'runs.jsonl').read_text().splitlines()]
    for name in 'xy': assert [r['i'] for r in records if r['by'] == name] == [*range(1000)]
    assert len(records) == 2000 and all(r['text'] == r['by']*5000 for r in records)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    "A function that runs the command in this process, with invented results of trainings, and returns the printed text"
    def _train(run):
        if run.seed == 1: raise RuntimeError('CUDA out of memory')
        if run.seed == 2: raise KeyboardInterrupt
        return dict(accuracy=.5, seconds=60., reached=run.sparsity, zeros={})
    monkeypatch.setattr(compare, 'train', _train)
    def _call(**kwargs):
        settings = dict(archs=run.arch, schedules='dense,one_cycle', sparsities='.8,.9', epochs='1', out=_call.out)
        compare.compare(**settings | kwargs)
        return capsys.readouterr().out
    _call.out = tmp_path/'runs.jsonl'
    return _call


def test_failed_does_not_stop_the_rest(call):
    call(seeds='1,0')
    states = [(r['seed'], r['state']) for r in read_records(call.out)]
    assert states == [(1, 'failed')]*3 + [(0, 'done')]*3
    assert read_records(call.out)[0]['error'] == 'RuntimeError: CUDA out of memory'
    assert '0 trainings remain' in call(seeds='1,0') and len(read_records(call.out)) == 6


def test_failed_is_tried_again_when_asked(call, monkeypatch):
    call(seeds='1,0')
    monkeypatch.setattr(compare, 'train', lambda run: dict(accuracy=.5, seconds=1., reached=run.sparsity, zeros={}))
    call(seeds='1,0', again=True)
    assert [(r['seed'], r['state']) for r in read_records(call.out)[6:]] == [(1, 'done')]*3
    assert len(read_runs(call.out)) == 6  # a training that failed first and succeeded later counts once


def test_ends_with_the_accuracies(call):
    "One table for each network, set of images and way to prune, of the trainings of this grid alone"
    call(seeds='3', sparsities='.5')  # in the file, and not in the grid below
    printed = call(seeds='0', schedules='dense,agp', contexts='local,global')
    _, heading, local, globally, last = [block.splitlines() for block in printed.strip().split('\n\n')]
    assert heading[0].startswith('Accuracy in per cent')
    headings = [f'{run.arch}, digits, {c}, all, large_final, seeds: 1' for c in ('local', 'global')]
    assert [local[0], globally[0]] == headings
    for table in (local, globally):
        assert table[1].split() == ['agp', 'dense']
        cells = [line.split()[-3:] for line in table[3:]]
        assert cells == [['80%', '**50.00**', '50.00'], ['90%', '**50.00**', '50.00']]
    assert last == ['0 trainings remain']


def test_accuracies_of_a_part(call):
    "Without dense trainings, and while none has finished"
    assert 'No training has finished' in call(seeds='1')
    printed = call(seeds='0', schedules='one_cycle')
    assert 'dense' not in printed and '**50.00**' in printed
    assert f'{run.arch}, digits, seeds: 1' in call(seeds='0', schedules='dense')


def test_interrupted_leaves_no_record(call):
    with pytest.raises(KeyboardInterrupt): call(seeds='0,2')
    assert {r['seed'] for r in read_records(call.out)} == {0} and len(read_records(call.out)) == 3


def test_dry_run(call):
    "The remaining trainings and their time are printed, and nothing is written"
    call(seeds='0')
    before = call.out.read_bytes()
    *_, one, two, last = call(seeds='0,3', epochs='1,2', dry_run=True).splitlines()
    # 3 of seed 3 at one epoch, 6 at two epochs, of a minute an epoch
    assert one.split()[-3:] == ['1', '3', '3.0'] and two.split()[-3:] == ['2', '6', '12.0']
    assert last == '9 trainings remain' and call.out.read_bytes() == before
    assert '?' in call(archs='resnet18_cifar', dry_run=True)


def test_shared(call):
    "The parts together are the whole grid, and no training is in two of them"
    for part in ('2/3', '1/3', '3/3'): call(seeds='0,3', part=part)
    trained = [(r['seed'], r['schedule'], r['sparsity']) for r in read_records(call.out)]
    assert len(set(trained)) == len(trained) == 6


def test_minutes(call):
    "A training that is not expected to end in time does not start; one of unknown time does"
    call(seeds='0,3', minutes=.5)
    assert len(read_records(call.out)) == 1
    call(seeds='0,3', minutes=1.5)
    assert len(read_records(call.out)) == 6


def test_done_by_another_meanwhile(call, monkeypatch):
    "A training that a second process records in the meantime is not done again"
    trained = []
    def _train(run):
        outcome = dict(state='done', accuracy=.5, seconds=1.)
        if not trained: append_record(call.out, asdict(replace(run, sparsity=.9)) | outcome)
        trained.append(run.sparsity)
        return dict(accuracy=.5, seconds=1., reached=run.sparsity, zeros={})
    monkeypatch.setattr(compare, 'train', _train)
    call(seeds='0', schedules='one_cycle', sparsities='.8,.9,.95')
    assert trained == [.8, .95] and len(read_records(call.out)) == 3


@pytest.mark.parametrize('given,says', [
    (dict(archs='resnet18_cifar,resnet81'), r"'resnet81'. Did you mean 'resnet18'\?"),
    (dict(data='cifar_10'), r"Did you mean 'cifar10'\?"),
    (dict(sparsities='.8,90'), r'got 90'),
    (dict(sparsities='.8,x'), r"'x'"),
    (dict(schedules='dense,agb'), r"'agb'. Did you mean 'agp'\?"),
    (dict(contexts='globl'), r"Did you mean 'global'\?"),
    (dict(layers='all,convs'), r"'convs'. Did you mean 'conv'\?"), (dict(smoothing=1.), r'smoothing'),
    (dict(bn_batches=-1), r'-1'),
    (dict(criteria='large_finl'), r"Did you mean 'large_final'\?"),
    (dict(epochs='0'), r'epochs'), (dict(bs=0), r'bs'), (dict(size=-1), r'size'), (dict(images=-5), r'images'),
    (dict(seeds=''), r"''"),
    (dict(part='0/2'), r"got '0/2'"), (dict(part='3/2'), r"got '3/2'"), (dict(part='half'), r"got 'half'"),
    (dict(archs='vgg16_bn_cifar'), r'8×8'),
], ids=str)
def test_refuses(given, says, call):
    "The command ends with one line, before it trains or writes anything"
    with pytest.raises(SystemExit, match=says) as e: call(**given)
    assert e.value.code.startswith('ocp-compare: ') and not call.out.exists()


def test_dense_is_trained_once():
    runs = grid([run.arch], ['digits'], [.8, .9, .95], ['dense', 'one_cycle'], ['local', 'global'], ['all'],
        ['large_final', 'random'], [2], [0, 1], bs=20, lr=.01, wd=.01, augment=False, bf16=False, channels_last=False,
        smoothing=0., bn_batches=12)
    assert len(runs) == len(set(runs)) == 2*(1 + 3*2*2)
    assert [r.seed for r in runs] == [0]*13 + [1]*13  # seed by seed


def accuracy_of(model):
    right = [(model(x).argmax(1) == y).float() for x, y in get_dls('digits', images=100).valid]
    return sum(map(sum, right)).item()/360


@pytest.mark.parametrize('schedule', ['one_cycle', 'dense'])
def test_both_statistics(schedule, monkeypatch):
    "A record has the accuracy with running statistics, and with statistics that are estimated again, also if dense"
    accuracies, models = [], []
    def _estimate(learn, **kwargs):
        models.append(learn.model)
        accuracies.append(accuracy_of(learn.model.eval()))
        return estimate_batchnorms(learn, **kwargs)
    monkeypatch.setattr(compare, 'estimate_batchnorms', _estimate)
    result = train(replace(run, schedule=schedule, epochs=2))
    accuracies.append(accuracy_of(models[0].eval()))
    assert [result['running'], result['accuracy']] == pytest.approx(accuracies) and len(set(accuracies)) == 2
    running = train(replace(run, schedule=schedule, epochs=2, bn_batches=0))
    assert running['running'] == running['accuracy'] == result['running'] and len(models) == 1


def test_convolutions_only():
    "The paper's setting leaves the linear layer dense"
    zeros = train(replace(run, layers='conv'))['zeros']
    sizes = {n: m.weight.numel() for n, m in layers_of(get_arch(run.arch)(num_classes=10)).items()}
    assert zeros == {n: 0 if n == '7' else round(.9*size) for n, size in sizes.items()}


@pytest.mark.parametrize('augment', [False, True])
def test_augment(augment, monkeypatch):
    "Each epoch of a training sees the same images, or the same ones in other places"
    seen = []
    class Look(compare.ValidateLast):
        def before_train(self): seen.append(set())
        def before_batch(self):
            if self.training: seen[-1] |= {str(o.tolist()) for o in self.x.sum(1)}
    monkeypatch.setattr(compare, 'ValidateLast', Look)
    train(replace(run, epochs=2, augment=augment, images=100, bs=100, bn_batches=0))
    assert len(seen) == 2 and (seen[0] == seen[1]) != augment


@pytest.mark.parametrize('bf16', [False, True])
def test_precision(bf16, monkeypatch):
    "Mixed precision computes in bfloat16, also on a CPU, and weights stay in float32"
    seen = set()
    class Look(compare.ValidateLast):
        order = 100
        def before_fit(self): self.learn.model[0][0].register_forward_hook(_look)
    def _look(m, x, y): seen.add((m.weight.dtype, y.dtype))
    monkeypatch.setattr(compare, 'ValidateLast', Look)
    train(replace(run, bf16=bf16, channels_last=True, bn_batches=0))
    assert seen == {(torch.float32, torch.bfloat16 if bf16 else torch.float32)}


@pytest.mark.parametrize('has_it', [False, True])
def test_slow_bfloat16(has_it, monkeypatch):
    "A CPU without instructions for bfloat16 is slower with it, so that is said"
    monkeypatch.setattr('onecycle_prune.experiments.common.cpu_has_bfloat16', lambda: has_it)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        train(replace(run, bf16=True, bn_batches=0))
    told = [o for o in caught if 'no instructions for bfloat16' in str(o.message)]
    assert len(told) == (0 if has_it else 1)


def test_record_says_what_was_trained(monkeypatch):
    "The recorded zeros of each layer are those of the model, and the accuracy is that of its last epoch"
    models, sparsity_of = [], compare.sparsity_report
    monkeypatch.setattr(compare, 'sparsity_report', lambda m: models.append(m) or sparsity_of(m))
    r = make_record(replace(run, epochs=2))
    model = models[0].eval()
    zeros = {n: int((m.weight == 0).sum()) for n, m in model.named_modules() if n in r['zeros']}
    assert r['zeros'] == zeros and len(zeros) == 21
    weights = {n: m.weight.numel() for n, m in model.named_modules() if n in zeros}
    assert zeros == {n: round(.9*w) for n, w in weights.items()}
    assert r['reached'] == sum(zeros.values())/sum(weights.values())
    assert r['accuracy'] == pytest.approx(accuracy_of(model))
    assert json.loads(json.dumps(r)) == r and r['torch'] and r['device'] and r['version']


@pytest.mark.parametrize('same', [True, False])
def test_other_copies_of_the_images(same, tmp_path, monkeypatch):
    "Trainings on other copies of the images are never put into one table in silence."
    out = tmp_path/'runs.jsonl'
    append_record(out, make_record(run))
    *images, vocab = data.load_images('digits', 8)
    if not same: images = [TensorDataset(255-ds.tensors[0], ds.tensors[1]) for ds in images]
    monkeypatch.setattr(data, 'load_images', lambda *args: (*images, vocab))
    append_record(out, make_record(replace(run, seed=1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert len(read_runs(out)) == 2
    said = ['Trainings on digits saw different copies of its images. Do not compare their accuracies.']
    assert [str(w.message) for w in caught] == ([] if same else said)


def test_all_schedules_start_alike(monkeypatch):
    "All schedules start with the same weights and the same first batch"
    seen = []
    class Look(compare.ValidateLast):
        def before_batch(self):
            if self.iter or not self.training: return
            seen.append((self.x.sum().item(), sum(p.double().sum().item() for p in self.model.parameters())))
    monkeypatch.setattr(compare, 'ValidateLast', Look)
    for s in ('dense', 'one_shot', 'iterative', 'agp', 'one_cycle'): train(replace(run, schedule=s))
    train(replace(run, seed=1))
    assert len(set(seen[:5])) == 1 and seen[5] != seen[0]


def test_validates_once(monkeypatch):
    learners, fit = [], compare.timed_fit
    monkeypatch.setattr(compare, 'timed_fit', lambda learn, *args: learners.append(learn) or fit(learn, *args))
    train(replace(run, epochs=3, bn_batches=0))
    names = learners[0].recorder.metric_names[1:-1]
    assert [*names] == ['train_loss', 'valid_loss', 'accuracy', 'sparsity']
    assert [len(v) for v in learners[0].recorder.values] == [2, 2, 4]


def test_commit_is_of_this_code_alone(tmp_path, monkeypatch):
    "A package inside somebody else's repository does not record that repository's commit"
    subprocess.run(['git', 'init', '-q', tmp_path], check=True)
    (tmp_path/'__init__.py').write_text('')
    monkeypatch.setattr(compare.onecycle_prune, '__file__', str(tmp_path/'__init__.py'))
    assert compare._commit() is None


results = sorted((Path(__file__).parents[2]/'results').glob('compare_*.jsonl'))


@pytest.mark.parametrize('path', results, ids=lambda p: p.stem)
def test_results_in_the_repository(path):
    "The records behind the published results are complete, without repetition, and reached their targets in each pool"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    done = [r for r in records if r['state'] == 'done']
    assert done and len(done) == len({tuple(r[f.name] for f in fields(Run)) for r in done})
    classes = dict(digits=10, cifar10=10, cifar100=100, caltech101=101)
    networks = {o: layers_of(get_arch(o[0])(num_classes=classes[o[1]])) for o in {(r['arch'], r['data']) for r in done}}
    for r in done:
        layers = networks[r['arch'], r['data']]
        pruned = {n: m.weight.numel() for n, m in layers.items() if r['layers'] != 'conv' or isinstance(m, nn.Conv2d)}
        assert not any(z for n, z in r['zeros'].items() if n not in pruned)
        if r['context'] == 'global': assert sum(r['zeros'].values()) == round(r['sparsity']*sum(pruned.values()))
        else: assert {n: r['zeros'][n] for n in pruned} == {n: round(r['sparsity']*w) for n, w in pruned.items()}
