"""Readers of the original files: tiny files of the true formats, read by ours and by torchvision, and what is refused."""

import gzip
import hashlib
import pickle
import shutil
import struct
import sys

import numpy as np
import pytest
import torch

from infopro_fast import data
from infopro_fast.data import cifar10, fashion_mnist_full, stl10, svhn
from infopro_fast.errors import DataError

rng = np.random.default_rng(0)


def md5_of(folder, names):
    contents = {name: (folder / name).read_bytes() for name in names}
    return {name: hashlib.md5(gzip.decompress(of) if name.endswith(".gz") else of).hexdigest() for name, of in contents.items()}


@pytest.fixture
def cifar(tmp_path):
    """Six batches of 20 images, pickled in protocol 2 like the originals."""
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    pixels = {}
    for name in cifar10.MD5:
        entry = {
            "batch_label": name,
            "labels": rng.integers(0, 10, 20).tolist(),
            "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            "filenames": [f"{i}.png" for i in range(20)],
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
        pixels[name] = entry
    return tmp_path, pixels, md5_of(folder, cifar10.MD5)


def test_cifar10_content(cifar):
    root, pixels, md5 = cifar
    images = cifar10.load(root, md5=md5)
    assert images.train.images.shape == (100, 3, 32, 32) and images.test.images.shape == (20, 3, 32, 32)
    for split, names in ((images.train, cifar10.TRAIN), (images.test, cifar10.TEST)):
        assert split.labels.tolist() == [label for name in names for label in pixels[name]["labels"]]
    third = pixels["data_batch_3"]["data"][7]
    for channel, row, column in ((0, 0, 0), (1, 3, 30), (2, 31, 31)):  # planes of 1024, rows first
        assert images.train.images[47, channel, row, column] == third[1024 * channel + 32 * row + column]
    assert (images.num_classes, images.image_size) == (10, 32)


def test_cifar10_equals_torchvision(cifar):
    datasets = pytest.importorskip("torchvision.datasets")
    root, _, md5 = cifar
    (root / cifar10.FOLDER / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))

    class Tiny(datasets.CIFAR10):
        train_list = [[name, md5[name]] for name in cifar10.TRAIN]
        test_list = [[name, md5[name]] for name in cifar10.TEST]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": None}

    images = cifar10.load(root, md5=md5)
    for split, train in ((images.train, True), (images.test, False)):
        theirs = Tiny(root, train=train)
        assert torch.equal(split.images, torch.from_numpy(theirs.data).permute(0, 3, 1, 2))
        assert split.labels.tolist() == theirs.targets
    assert {n: m for n, m in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list} == cifar10.MD5
    assert (datasets.CIFAR10.url, datasets.CIFAR10.tgz_md5) == (cifar10.URL, cifar10.ARCHIVE_MD5)


def test_cifar10_never_runs_code(cifar, tmp_path):
    """A pickle that would create a file: refused, even with the right checksum, and nothing runs."""
    root, _, _ = cifar
    sentinel = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(sentinel), "w"))

    (root / cifar10.FOLDER / "data_batch_2").write_bytes(pickle.dumps({"data": Payload(), "labels": []}, protocol=2))
    with pytest.raises(DataError, match="io.open, which no CIFAR-10 batch contains: refused"):
        cifar10.load(root, md5=md5_of(root / cifar10.FOLDER, cifar10.MD5))
    assert not sentinel.exists()


def test_cifar10_other_pickles_are_refused_by_name(cifar):
    root, _, _ = cifar
    for content in (pickle.dumps([1, 2]), b"no pickle", pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]})):
        (root / cifar10.FOLDER / "test_batch").write_bytes(content)
        with pytest.raises(DataError, match="test_batch is not a CIFAR-10 batch"):
            cifar10.load(root, md5=md5_of(root / cifar10.FOLDER, cifar10.MD5))


@pytest.fixture
def clothes(tmp_path):
    """Files of the true format: 7 training and 3 test images."""
    content = {}
    for name in fashion_mnist_full.MD5:
        count, images = (7 if name.startswith("train") else 3), "images" in name
        array = rng.integers(0, 256 if images else 10, (count, 28, 28) if images else (count,), dtype=np.uint8)
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / name).write_bytes(gzip.compress(header + array.tobytes()))
        content[name] = array
    return tmp_path, content


def test_fashion_mnist_full_content(clothes):
    root, content = clothes
    images = fashion_mnist_full.load(root, md5=md5_of(root, fashion_mnist_full.MD5))
    for split, part in ((images.train, "train"), (images.test, "t10k")):
        pixels = content[f"{part}-images-idx3-ubyte.gz"]
        assert split.images.shape == (len(pixels), 3, 32, 32)
        assert torch.equal(split.images[:, 1, 2:30, 2:30], torch.from_numpy(pixels)) and split.images[:, :, :2].sum() == 0
        assert split.labels.tolist() == content[f"{part}-labels-idx1-ubyte.gz"].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes((0, 0, 9, 3)) + bytes(12), "train-images-idx3-ubyte.gz is not an IDX file of bytes with 3 axes"),
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 28, 28) + bytes(5), "expected 1568 bytes for .*, got 5"),
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 2, 2) + bytes(4), "expected images of 28x28"),
    ],
)
def test_fashion_mnist_full_refuses_other_content(clothes, content, message):
    root, _ = clothes
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=message):
        fashion_mnist_full.load(root, md5=md5_of(root, fashion_mnist_full.MD5))


def test_fashion_mnist_full_damaged(clothes):
    root, _ = clothes
    path = root / "train-images-idx3-ubyte.gz"
    md5, whole = md5_of(root, fashion_mnist_full.MD5), path.read_bytes()
    other = gzip.compress(b"x")
    for content, got in ((b"plain", "none: Not a gzipped file"), (whole[:-20], "none: Compressed file ended"), (other, "9dd4")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"fashion_mnist_full: .* is damaged or another version: MD5 expected .*, got {got}"):
            fashion_mnist_full.load(root, md5=md5)


def test_fashion_mnist_full_download_repairs(clothes, tmp_path, monkeypatch):
    """What is damaged or missing is fetched, what is whole is left; by torchvision, with a folder in the place of the server."""
    utils = pytest.importorskip("torchvision.datasets.utils")
    root, _ = clothes
    md5, own = md5_of(root, fashion_mnist_full.MD5), tmp_path / "own"
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, to: shutil.copy(root / url.removeprefix(fashion_mnist_full.URL), to))
    damaged, missing, *whole = md5
    fashion_mnist_full.load(own, download=True, md5=md5)
    for name in whole:
        (root / name).unlink()  # cannot be fetched again
    (own / damaged).write_bytes((own / damaged).read_bytes()[:-9])
    (own / missing).unlink()
    assert len(fashion_mnist_full.load(own, download=True, md5=md5).train) == 7
    (own / whole[0]).write_bytes(b"")
    with pytest.raises(DataError, match=f"fashion_mnist_full: download into {own} failed: .*{whole[0]}"):
        fashion_mnist_full.load(own, download=True, md5=md5)


def test_fashion_mnist_full_address_is_one_that_answers():
    """An S3 bucket's website has no HTTPS."""
    assert fashion_mnist_full.URL.startswith("http://") and ".s3-website." in fashion_mnist_full.URL


@pytest.fixture
def digits(tmp_path):
    io = pytest.importorskip("scipy.io")
    content = {}
    for name, count in (("train_32x32.mat", 23), ("test_32x32.mat", 11)):
        entry = {"X": rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8), "y": rng.integers(1, 11, (count, 1), dtype=np.uint8)}
        entry["y"][:2] = [[10], [1]]
        io.savemat(tmp_path / name, entry)
        content[name] = entry
    return tmp_path, content, md5_of(tmp_path, svhn.MD5)


def test_svhn_content(digits):
    root, content, md5 = digits
    images = svhn.load(root, md5=md5)
    for split, name in ((images.train, "train_32x32.mat"), (images.test, "test_32x32.mat")):
        X, y = content[name]["X"], content[name]["y"]
        assert split.images.shape == (len(y), 3, 32, 32) and split.images.is_contiguous()
        assert split.images[5, 2, 30, 1] == X[30, 1, 2, 5]
        assert torch.equal(split.images, torch.from_numpy(X).permute(3, 2, 0, 1))
        assert split.labels.tolist() == [int(v) % 10 for v in y[:, 0]]
    assert images.train.labels[0] == 0


def test_svhn_equals_torchvision(digits):
    datasets = pytest.importorskip("torchvision.datasets")
    root, _, md5 = digits

    class Tiny(datasets.SVHN):
        split_list = {part: ["", f"{part}_32x32.mat", md5[f"{part}_32x32.mat"]] for part in ("train", "test")}

    images = svhn.load(root, md5=md5)
    for split, part in ((images.train, "train"), (images.test, "test")):
        theirs = Tiny(root, split=part)
        assert torch.equal(split.images, torch.from_numpy(theirs.data.copy()))
        assert split.labels.tolist() == theirs.labels.tolist()
        assert datasets.SVHN.split_list[part][1:] == [f"{part}_32x32.mat", svhn.MD5[f"{part}_32x32.mat"]]


def test_svhn_without_scipy(digits, monkeypatch):
    root, _, md5 = digits
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="svhn: .* scipy, which is not installed: pip install scipy"):
        svhn.load(root, md5=md5)


def test_svhn_refuses_other_content(digits):
    root, _, _ = digits
    (root / "test_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file, or so it says" * 20)
    with pytest.raises(DataError, match="test_32x32.mat is not an SVHN file"):
        svhn.load(root, md5=md5_of(root, svhn.MD5))


@pytest.fixture
def stl(tmp_path):
    folder = tmp_path / stl10.FOLDER
    folder.mkdir()
    content = {}
    for part, count in (("train", 6), ("test", 4)):
        pixels = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        labels = rng.integers(1, 11, count, dtype=np.uint8)
        labels[:2] = [1, 10]
        pixels.tofile(folder / f"{part}_X.bin")
        labels.tofile(folder / f"{part}_y.bin")
        content[part] = pixels, labels
    return tmp_path, content, md5_of(folder, stl10.MD5)


def test_stl10_content(stl):
    root, content, md5 = stl
    images = stl10.load(root, md5=md5)
    for split, part in ((images.train, "train"), (images.test, "test")):
        pixels, labels = content[part]
        assert split.images[1, 2, 90, 5] == pixels[1, 2, 5, 90]  # the file has columns first
        assert torch.equal(split.images, torch.from_numpy(pixels).transpose(2, 3))
        assert split.labels.tolist() == [int(v) - 1 for v in labels]
    assert (images.num_classes, images.image_size) == (10, 96)  # ten classes: the released code made a 100-way classifier


def test_stl10_equals_torchvision(stl):
    datasets = pytest.importorskip("torchvision.datasets")
    root, _, md5 = stl

    class Tiny(datasets.STL10):
        train_list = [[name, md5[name]] for name in ("train_X.bin", "train_y.bin")]
        test_list = [[name, md5[name]] for name in ("test_X.bin", "test_y.bin")]

    images = stl10.load(root, md5=md5)
    for split, part in ((images.train, "train"), (images.test, "test")):
        theirs = Tiny(root, split=part)
        assert torch.equal(split.images, torch.from_numpy(theirs.data.copy()))
        assert split.labels.tolist() == theirs.labels.tolist()
    published = {n: m for n, m in datasets.STL10.train_list + datasets.STL10.test_list if not n.startswith("unlabeled")}
    assert published == stl10.MD5 and datasets.STL10.tgz_md5 == stl10.ARCHIVE_MD5


def test_stl10_counts_must_agree(stl):
    root, _, _ = stl
    path = root / stl10.FOLDER / "test_X.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="test_X.bin holds 110587 bytes, expected 27648 for each of 4 labels"):
        stl10.load(root, md5=md5_of(root / stl10.FOLDER, stl10.MD5))


@pytest.mark.parametrize("name", ["cifar10", "svhn", "stl10"])
def test_missing_and_damaged_files_are_named(name, tmp_path):
    """By the real checksums: the files' own folder is empty, then it holds something else under the right name."""
    if name == "svhn":
        pytest.importorskip("scipy.io")
    with pytest.raises(DataError, match=f"{name}: .* got none"):
        data.load(name)
    with pytest.raises(DataError, match=f"{name}: --data-root .*nowhere is not a folder"):
        data.load(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=f"{name}: .*not found; put the original files there or add --download"):
        data.load(name, tmp_path)
    module = {"cifar10": cifar10, "svhn": svhn, "stl10": stl10}[name]
    folder = tmp_path / getattr(module, "FOLDER", "")
    folder.mkdir(exist_ok=True)
    first = next(iter(module.MD5))
    (folder / first).write_bytes(b"half of a file")
    with pytest.raises(DataError, match=f"{name}: .*{first} is damaged or another version: MD5 expected {module.MD5[first]}"):
        data.load(name, tmp_path)


def test_download_only_when_asked_and_errors_named(cifar, monkeypatch):
    """The fetch runs only with download=True and a file that is missing or damaged; a failure names the data set."""
    root, _, md5 = cifar
    calls = []
    monkeypatch.setattr(cifar10, "fetch_archive", lambda url, at, md5: calls.append(at))
    cifar10.load(root, download=True, md5=md5)
    assert calls == []
    path = root / cifar10.FOLDER / "data_batch_4"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="damaged"):
        cifar10.load(root, md5=md5)
    assert calls == []
    with pytest.raises(DataError, match="after the download: .*data_batch_4 is damaged"):
        cifar10.load(root, download=True, md5=md5)
    monkeypatch.setattr(cifar10, "fetch_archive", lambda *_: path.write_bytes(whole))
    assert len(cifar10.load(root, download=True, md5=md5).train) == 100

    def fail(*_):
        raise OSError("no route to host")

    path.unlink()
    monkeypatch.setattr(cifar10, "fetch_archive", fail)
    with pytest.raises(DataError, match="cifar10: download into .* failed: no route to host"):
        cifar10.load(root, download=True, md5=md5)


def test_unknown_name():
    with pytest.raises(DataError, match="expected one of .*'fashion_mnist', 'shapes_seg', 'fashion_mnist_full', 'cifar10'.*, got 'mnist'"):
        data.load("mnist")
