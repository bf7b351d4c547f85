"The command on a folder of a few images, in a folder with a space in its name."
import os, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest
from fastai.basics import load_learner
from onecycle_prune.experiments import demo as module
from onecycle_prune.experiments.demo import demo
from PIL import Image

arch = 'shufflenet_v2_x0_5'
trainings = ['dense', 'lin', 'one_shot', 'iterative', 'agp']
written = {'layers.csv', 'layers.png', 'learner.pkl', 'schedules.png', 'training.png', 'trainings.csv'}


def make_images(folder, n=12):
    "Noise that is red in one class and blue in the other"
    rng = np.random.default_rng(0)
    for c, name in enumerate(('red', 'blue')):
        (folder/name).mkdir(parents=True)
        for i in range(n):
            im = rng.integers(0, 64, (8, 8, 3), dtype='uint8')
            im[..., 2*c] += 190
            Image.fromarray(im).save(folder/name/f'{i}.png')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp('a place')
    make_images(path/'my images')
    return path


@pytest.fixture(scope='module')
def run(place, tmp_path_factory):
    "The console command, run once, with its output in a pipe"
    # The script that pip writes for an entry of console_scripts
    script = tmp_path_factory.mktemp('bin')/'ocp-demo'
    script.write_text('import sys\nfrom onecycle_prune.experiments.demo import demo\n'
        'if __name__ == "__main__": sys.exit(demo())\n')
    args = ['--arch', arch, '--data', 'my images', '--epochs', '1', '--bs', '8', '--sparsity', '.75',
        '--schedule', 'lin', '--out', 'what came out']
    env = os.environ | dict(MPLBACKEND='agg', PYTHONIOENCODING='utf-8', PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    return subprocess.run([sys.executable, script, *args], cwd=place, capture_output=True, encoding='utf-8', env=env,
        timeout=120)


def test_exits_well(run): assert run.returncode == 0, run.stdout + run.stderr


def test_leaves_files(run, place):
    assert {p.name for p in (place/'what came out').iterdir()} == written
    assert all((place/'what came out'/n).stat().st_size > 100 for n in written)
    assert {p.name for p in place.iterdir()} == {'my images', 'what came out'}
    listed, = [line for line in run.stdout.splitlines() if line.startswith('In what came out/:')]
    for n in written: assert n in listed


def test_table(run, place):
    "Five trainings are printed, and the file has the same numbers"
    *_, table = run.stdout.partition('All with the same budget of 1 epochs:\n')
    header, _, *rows = [line.split() for line in table.split('\n\n')[0].splitlines()]
    csv = pd.read_csv(place/'what came out'/'trainings.csv', index_col='training')
    assert header == [*csv] == ['accuracy', 'sparsity', 'seconds']
    assert [r[0] for r in rows] == [*csv.index] == trainings
    assert np.allclose([[float(v) for v in r[1:]] for r in rows], csv, rtol=1e-3)
    assert csv.sparsity['dense'] == 0 and np.allclose(csv.sparsity[1:], .75, atol=1e-3)
    assert csv.accuracy.between(0, 1).all() and (csv.seconds > 0).all()


def test_deployed(run):
    "The last table goes from dense to sped up; the outputs are the same, and the file is smaller"
    *_, table = run.stdout.partition('The file, and the time of one image')
    rows = {line.split()[0]: [float(o) for o in line.split()[-3:]] for line in table.splitlines()[3:6]}
    rows['sped up'] = [float(o) for o in table.splitlines()[6].split()[-3:]]
    assert list(rows) == ['dense', 'pruned', 'compressed', 'sped up']
    accuracy, size, ms = zip(*rows.values())
    assert accuracy[1] == accuracy[2] == accuracy[3] and size[3] == size[2] < size[1] == size[0] and min(ms) > 0


def test_piped_output_is_plain(run):
    "A pipe gets no carriage return and no bar, and nothing stands above the first words of the demo"
    assert '\r' not in run.stdout and not set(run.stdout) & set('█|')
    assert run.stdout.split('\n')[:2] == ['', f'{arch}, dense: 1 epochs']
    assert 'Warning' not in run.stderr.split(f'{arch}, dense')[0]


def test_import_warns_of_nothing(tmp_path):
    "The warnings while fastai is imported do not reach a user, and later ones of the same kind do"
    code = 'import onecycle_prune.experiments.demo, warnings; warnings.warn("later", FutureWarning)'
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=120)
    assert done.returncode == 0 and done.stderr.count('Warning') == 1 and 'FutureWarning: later' in done.stderr


def test_accuracy_of_each_training(run):
    "Each training prints a line for its epoch, with the accuracy of the table at the end"
    lines = [line for line in run.stdout.splitlines() if line.startswith('epoch 0, ')]
    printed = [dict(o.split(' ', 1) for o in line.split(', ')) for line in lines]
    rows = run.stdout.partition('All with the same budget of 1 epochs:\n')[2].splitlines()[2:2+len(trainings)]
    assert [float(o['accuracy']) for o in printed] == pytest.approx([float(row.split()[1]) for row in rows], abs=1e-4)
    assert ['sparsity' in o for o in printed] == [False] + [True]*4


def test_says_what_to_do_next(run):
    "Three lines at the end"
    steps = run.stdout.partition('What to do next:\n')[2].splitlines()
    assert len(steps) == 3
    expected = [str(Path('what came out')/'learner.pkl'), 'https://', "make demo ARGS='--data path'"]
    for step, words in zip(steps, expected): assert words in step


def test_warm_up_changes_nothing(place, monkeypatch):
    "With and without the warm-up, the trainings give the same"
    def _accuracies(out):
        demo(arch=arch, data=place/'my images', epochs=1, bs=8, sparsity=.5, granularity='filter', out=place/out)
        return pd.read_csv(place/out/'trainings.csv')[['accuracy', 'sparsity']], pd.read_csv(place/out/'layers.csv')
    with_it = _accuracies('warm')
    monkeypatch.setattr(module, 'warm_up', lambda *args: None)
    for a, b in zip(with_it, _accuracies('cold')): pd.testing.assert_frame_equal(a, b)


def test_layers(run, place):
    csv = pd.read_csv(place/'what came out'/'layers.csv')
    layers, total = csv[csv['shape'].notna()], csv.set_index('layer').loc['total']
    assert (layers.zeros < layers.weights).all() and total.weights == layers.weights.sum()
    assert total.zeros == layers.zeros.sum() == round(.75*total.weights)


@pytest.mark.filterwarnings('ignore::UserWarning')  # `load_learner` warns about pickles
def test_learner_predicts(run, place):
    learn = load_learner(place/'what came out'/'learner.pkl')
    with learn.no_bar(): label, i, probs = learn.predict(place/'my images'/'red'/'0.png')
    assert label in ('red', 'blue') and label == learn.dls.vocab[i] and probs.sum().item() == pytest.approx(1)
    csv = pd.read_csv(place/'what came out'/'layers.csv')
    assert sum(int((p == 0).sum()) for p in learn.model.parameters()) == csv.zeros.iloc[-1]


@pytest.mark.parametrize('given,says', [
    (dict(sparsity=95), r'got 95.*Did you mean 0\.95\?'),
    (dict(schedule='one_cylce'), r"'one_cylce'. Did you mean 'one_cycle'\?"),
    (dict(arch='resnet81'), r"'resnet81'. Did you mean 'resnet18'\?"),
    (dict(data='missing'), r"'missing'"),
    (dict(granularity='filtre'), r"'filtre'. Did you mean 'filter'\?"),
    (dict(context='globl'), r"'globl'. Did you mean 'global'\?"),
    (dict(data='no images'), r"'no images'"),
    (dict(epochs=0), r'epochs'),
    (dict(bs=0), r'bs'),
    (dict(size=0), r'size'),
    (dict(granularity='2:4'), r'implies a sparsity of 0\.5'),
], ids=str)
def test_refuses(given, says, tmp_path, monkeypatch):
    "The command ends with one line about the mistake, and writes nothing"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'no images').mkdir()
    with pytest.raises(SystemExit, match=says) as e: demo(**dict(epochs=1) | given)
    assert isinstance(e.value.code, str) and len(e.value.code.splitlines()) == 1  # Python prints it, and exits with 1
    assert [p.name for p in tmp_path.iterdir()] == ['no images']


def test_refuses_before_training(place, capsys):
    "A pattern that does not fit the network raises an error before the dense training, which may take hours"
    with pytest.raises(SystemExit, match='3 input channels do not divide by 4'):
        demo(arch=arch, data=place/'my images', epochs=1, bs=8, sparsity=.5, granularity='2:4', out=place/'nothing')
    assert 'dense' not in capsys.readouterr().out and not (place/'nothing').exists()
