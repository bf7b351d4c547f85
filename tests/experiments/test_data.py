"The images of the experiments: read from folders like those of fastai's sources, and equal to those of its loader."
import numpy as np, onecycle_prune.experiments.data as data, pytest, torch
from fastai.vision.all import ImageDataLoaders, Resize, TensorImage, set_seed
from PIL import Image


def make_images(folder, classes, n=6, size=(32, 32)):
    "PNG images of noise, different in each folder"
    for c in classes:
        rng = np.random.default_rng(list((folder/c).as_posix().encode()))
        (folder/c).mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype='uint8'))
            image.save(folder/c/f'{c}_{i}.png')


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with the images of the sources (`source`) and with the decoded ones (`kept`)"
    monkeypatch.setattr(data, 'untar_data', lambda url: tmp_path/'source')
    monkeypatch.setattr(data, 'fastai_path', lambda folder: tmp_path/'kept')
    data.load_images.cache_clear()
    yield tmp_path
    data.load_images.cache_clear()


def as_set(x, y, vocab):
    "Images and the names of their classes as a set, since the order of files in a folder is not defined"
    return {((255*x).round().byte().numpy().tobytes(), vocab[c]) for x, c in zip(x, y)}


def test_same_images_as_fastai(place):
    "Every image and its class are the same, for training and validation, original and resized"
    for part in ('train', 'test'): make_images(place/'source'/part, ('cat', 'dog', 'frog'), size=(40, 32))
    for size in (32, 20):
        train, valid, vocab = data.load_images('cifar10', size)
        # fastai crops validation images to the middle, as we do, so its validation set reads each of the two folders.
        for ds, part in ((train, 'train'), (valid, 'test')):
            other = 'test' if part == 'train' else 'train'
            theirs = ImageDataLoaders.from_folder(place/'source', train=other, valid=part,
                item_tfms=Resize(size), bs=18, num_workers=0)
            seen = as_set(*theirs.valid.one_batch(), theirs.vocab)
            assert seen == as_set(ds.tensors[0]/255, ds.tensors[1], vocab) and len(seen) == 18


def test_cifar100(place):
    "Classes are in the folders of their superclasses, and the labels are the classes"
    for part in ('train', 'test'):
        make_images(place/'source'/part/'fish', ('ray', 'shark', 'trout'))
        make_images(place/'source'/part/'flowers', ('poppy', 'rose'))
    dls = data.get_dls('cifar100', bs=10)
    assert dls.vocab == ['poppy', 'ray', 'rose', 'shark', 'trout'] and dls.c == 5
    for ds in (dls.train.dataset, dls.valid.dataset):
        assert ds.tensors[0].shape == (30, 3, 32, 32) and ds.tensors[1].bincount().tolist() == [6]*5


def test_caltech101(place):
    "A fifth of each class is held out, always the same, and the background is not a class"
    make_images(place/'source', ('BACKGROUND_Google', 'ant', 'bonsai', 'crab'), n=10, size=(50, 60))
    train, valid, vocab = data.load_images('caltech101', 24)
    assert vocab == ['ant', 'bonsai', 'crab'] and train.tensors[0].shape == (24, 3, 24, 24)
    assert train.tensors[1].bincount().tolist() == [8]*3 and valid.tensors[1].bincount().tolist() == [2]*3
    files = [sorted(f.name for f in part) for part in data.sources['caltech101'].files()]
    assert not set(files[0]) & set(files[1]) and len(set(files[0] + files[1])) == 30
    assert files[1] == [sorted(f.name for f in part) for part in data.sources['caltech101'].files()][1]


def test_kept(place, monkeypatch):
    "Images are decoded once, and again if their files, their number or their size change"
    make_images(place/'source', ('a',), n=4)
    files, decodings, decode = sorted((place/'source'/'a').iterdir()), [], data.decode
    monkeypatch.setattr(data, 'decode', lambda files, size: decodings.append(size) or decode(files, size))
    first = data.load_decoded(files, 32)
    assert (data.load_decoded(files, 32) == first).all() and decodings == [32]
    data.load_decoded(files, 16)
    data.load_decoded(files[:3], 32)
    assert decodings == [32, 16, 32]
    Image.new('RGB', (32, 32), 'red').save(files[0])
    assert not (data.load_decoded(files, 32)[0] == first[0]).all() and len(decodings) == 4
    assert all(p.suffix == '.npy' and not p.name.startswith('unfinished') for p in (place/'kept'/'decoded').iterdir())


def test_broken_off_decoding_is_done_again(place, monkeypatch):
    make_images(place/'source', ('a',), n=2)
    files = sorted((place/'source'/'a').iterdir())
    def _interrupt(files, size): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(data, 'decode', _interrupt)
        with pytest.raises(KeyboardInterrupt): data.load_decoded(files, 32)
    assert (data.load_decoded(files, 32)[1].transpose(1, 2, 0) == np.asarray(Image.open(files[1]))).all()


def epoch(dls): return [(x.clone(), y.clone()) for x, y in dls.train]


def test_order_and_crops_repeat(place):
    "The same seed gives the same batches, and each epoch has other ones"
    for part in ('train', 'test'): make_images(place/'source'/part, ('cat', 'dog'), n=16)
    def _dls(seed):
        set_seed(seed)
        return data.get_dls('cifar10', bs=8, device=torch.device('cpu'), augment=True)
    dls = _dls(0)
    first, second = epoch(dls), epoch(dls)
    again = epoch(_dls(0))
    assert all((x == a).all() and (y == b).all() for (x, y), (a, b) in zip(first, again, strict=True))
    assert not all((y == b).all() for (_, y), (_, b) in zip(first, second))
    assert not all((y == b).all() for (_, y), (_, b) in zip(first, epoch(_dls(1))))


def test_all_are_seen_and_normalized(place):
    "An epoch has each training image once; validation images are normalized by the statistics of the training images"
    for part in ('train', 'test'): make_images(place/'source'/part, ('cat', 'dog'), n=16)
    dls = data.get_dls('cifar10', bs=8, device=torch.device('cpu'))
    assert sorted(torch.cat([y for _, y in epoch(dls)]).tolist()) == [0]*16 + [1]*16
    x = data.load_images('cifar10', 32)[0].tensors[0].numpy()/255
    y = data.load_images('cifar10', 32)[1].tensors[0].numpy()/255
    mean, std = x.mean((0, 2, 3), keepdims=True), x.std((0, 2, 3), keepdims=True)
    seen = torch.cat([x for x, _ in dls.valid]).numpy()
    np.testing.assert_allclose(seen, (y-mean)/std, atol=1e-4)


@pytest.mark.parametrize('augment', [False, True])
def test_augmented(augment, place):
    "What a loader gives to the training are the images themselves, or shifts of them, mirrored or not"
    for part in ('train', 'test'): make_images(place/'source'/part, ('cat', 'dog'), n=16)
    dls = data.get_dls('cifar10', bs=8, device=torch.device('cpu'), augment=augment)
    train, valid, _ = data.load_images('cifar10', 32)
    mean, std = (o[None] for o in data._channel_stats(train.tensors[0]))
    def pixels(dl): return torch.cat([x*std + mean for x, _ in dl]).mul(255).round().byte()
    def distinct(images): return {bytes(o.flatten().tolist()) for o in images}
    padded = torch.nn.functional.pad(train.tensors[0], [2]*4)
    windows = [o[..., i:i+32, j:j+32] for o in (padded, padded.flip(3)) for i in range(5) for j in range(5)]
    originals, shifts = distinct(train.tensors[0]), set.union(*map(distinct, windows))
    seen = distinct(pixels(dls.train))
    assert seen <= shifts and len(seen) == 32
    assert len(seen & originals) < 6 if augment else seen == originals
    assert pixels(dls.valid).equal(valid.tensors[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_the_gpu():
    dls = data.get_dls('digits', device=torch.device('cuda'))
    assert all(t.is_cuda for ds in (dls.train.dataset, dls.valid.dataset) for t in ds.tensors)
    assert all(t.is_cuda for t in dls.one_batch())


def test_digits_are_not_mirrored():
    "A mirrored digit means something else: values that rise to the right do so in every crop, except at the border"
    dls = data.get_dls('digits', augment=True)
    crop = next(t for t in dls.train.after_batch if isinstance(t, data.CropMirror))
    x = TensorImage(torch.arange(1, 9).expand(64, 3, 8, 8).clone())
    inner = slice(crop.pad, -crop.pad)
    assert (crop(x, split_idx=0)[:, :, inner, inner].diff(dim=3) == 1).all()


def test_digits_of_two_processes(tmp_path, monkeypatch):
    "Another process may write the same folder in the meantime"
    load, calls = data.load_digits, []

    def slow(**kwargs):
        calls.append(1)
        if len(calls) == 1: data.digits_folder(tmp_path/'digits')  # the other process
        return load(**kwargs)
    monkeypatch.setattr(data, 'load_digits', slow)
    assert len(list(data.digits_folder(tmp_path/'digits').glob('*/*.png'))) == 1797
    assert [o.name for o in tmp_path.iterdir()] == ['digits']
    assert len(calls) == 2
