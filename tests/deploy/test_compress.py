"Compressed files: smaller, the same contents, and never half a file"
import os, pickle, zipfile

import pytest, torch
from fastai.learner import load_learner
from onecycle_prune.all import Sparsifier, compress
from torch import nn
from torchvision.models import resnet18

from helpers import assert_same, bits
from networks import tiny_net
from reference import total_zeros


def test_resnet18(tmp_path):
    "A ResNet-18 with 95 % zeros takes at most 7 % of its size, bit for bit"
    net = resnet18()
    Sparsifier(net).prune(.95)
    path = tmp_path/'net.pth'
    torch.save(net.state_dict(), path)
    before = path.stat().st_size
    factor = compress(path)
    assert path.stat().st_size <= .07*before
    assert factor == pytest.approx(before/path.stat().st_size)
    assert_same(torch.load(path), net.state_dict())


@pytest.mark.parametrize('level', [1, 6, 9])
def test_all_types(tmp_path, level):
    "Tensors of all types, nested containers, empty tensors and other objects"
    types = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool]
    saved = dict(tensors=[torch.zeros(5, 7, dtype=t) for t in types], empty=torch.zeros(0), text='ä', n=3)
    torch.save(saved, tmp_path/'a.pt')
    assert compress(tmp_path/'a.pt', level) > 0
    loaded = torch.load(tmp_path/'a.pt')
    assert_same(loaded['tensors'] + [loaded['empty']], saved['tensors'] + [saved['empty']])
    assert (loaded['text'], loaded['n']) == ('ä', 3)


def test_learner(item_learner, prune):
    "An exported learner and a saved one are read as before, in the same place"
    learn = item_learner()
    learn.fit(1, 1e-2, cbs=prune(.9))
    expected = bits(learn.model)
    saved = learn.save('a')
    learn.export('learner.pkl')
    assert compress(saved) > 1 and compress(learn.path/'learner.pkl') > 1
    for p in learn.model.parameters(): p.data.fill_(1)
    assert_same(bits(learn.load('a').model), expected)
    loaded = load_learner(learn.path/'learner.pkl')
    assert_same(bits(loaded.model), expected)
    assert total_zeros(loaded.model) == total_zeros(learn.model)
    assert len(loaded.predict(3)) == 3


def test_whole_model_and_link(tmp_path):
    "A pickled model, through a link: the link stays, and so do the rights of the file"
    path = tmp_path/'net.pt'
    torch.save(nn.Linear(300, 300), path)
    path.chmod(0o640)
    link = tmp_path/'link.pt'
    link.symlink_to(path)
    before = path.stat().st_size
    compress(link)
    assert link.is_symlink() and path.stat().st_size < before and path.stat().st_mode % 0o1000 == 0o640
    assert isinstance(torch.load(path, weights_only=False), nn.Linear)


def test_mmap(tmp_path):
    "`mmap=True` is refused by PyTorch, and does not give wrong weights"
    torch.save(torch.zeros(1000), tmp_path/'a.pt')
    compress(tmp_path/'a.pt')
    with pytest.raises(RuntimeError): torch.load(tmp_path/'a.pt', mmap=True)


def old_format(path): torch.save({}, path, _use_new_zipfile_serialization=False)


def a_pickle(path): path.write_bytes(pickle.dumps({}))


def a_zip(path):
    with zipfile.ZipFile(path, 'w') as f: f.writestr('a.txt', 'no tensors')


def truncated(path):
    torch.save(torch.zeros(10**4), path)
    path.write_bytes(path.read_bytes()[:-1000])


def damaged(path):
    torch.save(torch.zeros(10**4), path)
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 255
    path.write_bytes(data)


def compressed(path):
    torch.save(torch.zeros(10**4), path)
    compress(path)


@pytest.mark.parametrize('make,message', [(old_format, 'older format'), (a_pickle, 'no zip archive'),
    (a_zip, 'not one of PyTorch'), (truncated, 'not complete'), (damaged, 'damaged'),
    (compressed, 'compressed already'), (lambda path: path.write_bytes(b''), 'no zip archive')])
def test_refused(tmp_path, make, message):
    "What is no whole file of PyTorch gets an answer, and stays as it was"
    path = tmp_path/'a.pt'
    make(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message): compress(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a.pt']


@pytest.mark.parametrize('level', [0, 10, -1, 1.5, True, '6', None])
def test_level(tmp_path, level):
    torch.save(tiny_net(), tmp_path/'a.pt')
    with pytest.raises(ValueError, match='from 1 .fastest. to 9'): compress(tmp_path/'a.pt', level)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError): compress(tmp_path/'a.pt')


@pytest.mark.parametrize('error', [OSError('disk full'), KeyboardInterrupt()])
def test_interrupted(tmp_path, monkeypatch, error):
    "An interruption leaves the file as it was, and nothing beside it"
    path = tmp_path/'a.pt'
    torch.save(torch.zeros(1000), path)
    before = path.read_bytes()
    def _fail(*args): raise error
    monkeypatch.setattr('onecycle_prune.deploy.compress._check_same', _fail)
    with pytest.raises(type(error)): compress(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a.pt']
