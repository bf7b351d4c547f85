"The command on a folder of a few images, in a folder with a space in its name."
import os, subprocess, sys

import numpy as np, pandas as pd, pytest
from fastai.basics import load_learner
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
    "The console command, run once"
    # what pip writes for an entry of console_scripts
    script = tmp_path_factory.mktemp('bin')/'ocp-demo'
    script.write_text('import sys\nfrom onecycle_prune.experiments.demo import demo\nif __name__ == "__main__": sys.exit(demo())\n')
    args = ['--arch', arch, '--data', 'my images', '--epochs', '1', '--bs', '8', '--sparsity', '.75', '--schedule', 'lin', '--out', 'what came out']
    env = os.environ | dict(MPLBACKEND='agg', PYTHONIOENCODING='utf-8', PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    return subprocess.run([sys.executable, script, *args], cwd=place, capture_output=True, encoding='utf-8', env=env, timeout=120)


def test_exits_well(run): assert run.returncode == 0, run.stdout + run.stderr


def test_leaves_files(run, place):
    assert {p.name for p in (place/'what came out').iterdir()} == written
    assert all((place/'what came out'/n).stat().st_size > 100 for n in written)
    assert {p.name for p in place.iterdir()} == {'my images', 'what came out'}
    for n in written: assert n in run.stdout.splitlines()[-1]


def test_table(run, place):
    "Five trainings are printed, and the file has the same numbers"
    *_, table = run.stdout.partition('All at the same budget of 1 epochs:\n')
    header, _, *rows = [line.split() for line in table.split('\n\n')[0].splitlines()]
    csv = pd.read_csv(place/'what came out'/'trainings.csv', index_col='training')
    assert header == [*csv] == ['accuracy', 'sparsity', 'seconds']
    assert [r[0] for r in rows] == [*csv.index] == trainings
    assert np.allclose([[float(v) for v in r[1:]] for r in rows], csv, rtol=1e-3)
    assert csv.sparsity['dense'] == 0 and np.allclose(csv.sparsity[1:], .75, atol=1e-3)
    assert csv.accuracy.between(0, 1).all() and (csv.seconds > 0).all()


def test_layers(run, place):
    csv = pd.read_csv(place/'what came out'/'layers.csv')
    assert (csv.zeros[:-1] < csv.weights[:-1]).all() and csv.weights.iloc[-1] == csv.weights[:-1].sum()
    assert csv.zeros.iloc[-1] == csv.zeros[:-1].sum() == round(.75*csv.weights.iloc[-1])


@pytest.mark.filterwarnings('ignore::UserWarning')  # `load_learner` warns of pickles
def test_learner_predicts(run, place):
    learn = load_learner(place/'what came out'/'learner.pkl')
    with learn.no_bar(): label, i, probs = learn.predict(place/'my images'/'red'/'0.png')
    assert label in ('red', 'blue') and label == learn.dls.vocab[i] and probs.sum().item() == pytest.approx(1)
    csv = pd.read_csv(place/'what came out'/'layers.csv')
    assert sum(int((p == 0).sum()) for p in learn.model.parameters()) >= csv.zeros.iloc[-1]


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
    "One line that says what is wrong, and nothing is left behind"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'no images').mkdir()
    with pytest.raises(SystemExit, match=says) as e: demo(**dict(epochs=1) | given)
    assert isinstance(e.value.code, str) and len(e.value.code.splitlines()) == 1  # Python prints it, and exits with 1
    assert [p.name for p in tmp_path.iterdir()] == ['no images']


def test_refuses_before_training(place, capsys):
    "What the network cannot have is known before the hours of the dense training"
    with pytest.raises(SystemExit, match='3 input channels do not divide by 4'):
        demo(arch=arch, data=place/'my images', epochs=1, bs=8, sparsity=.5, granularity='2:4', out=place/'nothing')
    assert 'dense' not in capsys.readouterr().out and not (place/'nothing').exists()
