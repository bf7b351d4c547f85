"The networks of recorded trainings, as they are timed"
import json, pandas as pd, pytest
from onecycle_prune.experiments.times import rebuild, time_records, time_runs

from reference import layers_of

arch = 'resnet18_cifar_quarter'
kind = dict(arch=arch, data='cifar10', size=8, schedule='one_cycle', accuracy=.5, state='done')


def zeros_of(network): return {n: int((m.weight == 0).sum()) for n, m in layers_of(network).items()}


def run(context, sparsity, **zeros):
    sizes = {n: m.weight.numel() for n, m in layers_of(rebuild(arch, {})).items()}
    return kind | dict(context=context, sparsity=sparsity, zeros={n: zeros.get(n, 0) for n in sizes})


def test_rebuild():
    "Each layer has as many zeros as the record, and the others have none"
    wanted = {'0.0': 401, '4.1.conv2': 36863, '7': 1}
    assert {n: k for n, k in zeros_of(rebuild(arch, wanted)).items() if k} == wanted
    assert not rebuild(arch, wanted).training


def test_unknown_layer():
    with pytest.raises(ValueError, match="has no layer '9'. Its layers: 0.0, "): rebuild(arch, {'9': 1})


def test_table(monkeypatch):
    "Seeds are one network with their mean zeros, dense ones come with the others, and each batch is timed"
    from onecycle_prune.experiments import times
    seen = []
    def _rebuild(*args):
        seen.append(zeros_of(rebuild(*args)))
        return rebuild(*args)
    monkeypatch.setattr(times, 'rebuild', _rebuild)
    runs = pd.DataFrame([run('', 0.), run('erk', .5, **{'7': 100}), run('erk', .5, **{'7': 103})])
    table = time_runs(runs, [1, 3], seconds=.05)
    assert [o['7'] for o in seen] == [0, 102]
    assert table[['context', 'sparsity', 'batch']].values.tolist() == [
        ['', 0., 1], ['erk', .5, 1], ['', 0., 3], ['erk', .5, 3]]
    assert (table.ms > 0).all()


def test_command(tmp_path):
    records = tmp_path/'records.jsonl'
    records.write_text(''.join(json.dumps(run('local', s, **{'7': k})) + '\n' for s, k in ((0., 0), (.5, 100))))
    time_records(records, batches='2', seconds=.05, out=tmp_path/'times.csv')
    table = pd.read_csv(tmp_path/'times.csv')
    assert table.sparsity.tolist() == [0, .5] and set(table.batch) == {2}


def test_no_records(tmp_path):
    with pytest.raises(SystemExit, match='ocp-times: No finished training'):
        time_records(tmp_path/'none.jsonl', out=tmp_path/'times.csv')
    assert not list(tmp_path.iterdir())
