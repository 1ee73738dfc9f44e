"""The embedded set, and epochs: which batches there are, and that they depend on (seed, epoch) alone."""

import hashlib
import importlib.resources

import pytest
import torch

from infopro_fast import data
from infopro_fast.data import Augmentation, ImageSet, Split, fashion_mnist, normalize
from infopro_fast.data.augment import _per_channel
from infopro_fast.data.image_set import epoch_seed
from infopro_fast.errors import DataError


@pytest.fixture(scope="module")
def embedded():
    return data.load("fashion_mnist")


def small(count=10, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 10
    splits = Split(images, labels), Split(images[:3], labels[:3])
    return ImageSet("small", *splits, 10, (0.5,) * 3, (0.25,) * 3, Augmentation(2, "reflect", True))


def test_embedded_content(embedded):
    assert embedded.train.images.shape == (8000, 3, 32, 32) and embedded.test.images.shape == (2000, 3, 32, 32)
    assert embedded.train.labels.bincount().tolist() == [800] * 10 and embedded.test.labels.bincount().tolist() == [200] * 10
    images = embedded.train.images
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert images[:, :, :2].sum() + images[:, :, -2:].sum() + images[..., :2].sum() + images[..., -2:].sum() == 0
    first_labels = embedded.train.labels[:4].tolist()
    assert first_labels == [9, 0, 0, 3]  # as in the original files
    inner = images[:, 0, 2:30, 2:30].contiguous().numpy().tobytes()
    digest = hashlib.sha256(inner + embedded.test.images[:, 0, 2:30, 2:30].contiguous().numpy().tobytes()).hexdigest()
    assert digest == "c010256c3c05f158437f7f6cc37a02a60be925d4348ab272d96a5ba95d05fae5"


def test_embedded_licence_lies_beside_it():
    folder = importlib.resources.files("infopro_fast.data") / "embedded"
    text = (folder / "LICENSE").read_text()
    assert "MIT License" in text and "Copyright (c) 2017 Zalando SE" in text and fashion_mnist.FILE in text
    assert (folder / fashion_mnist.FILE).is_file()


def test_embedded_constants(embedded):
    pixels = embedded.train.images.double() / 255
    assert abs(pixels.mean() - fashion_mnist.MEAN[0]) < 1e-4 and abs(pixels.std() - fashion_mnist.STD[0]) < 1e-4


def test_an_epoch_holds_every_image_once():
    images = small(10)
    batches = list(images.train_epoch(4, seed=0, epoch=0, augmented=False))
    assert [len(label) for _, label in batches] == [4, 4, 2] and images.batches(4) == 3
    assert sorted(torch.cat([label for _, label in batches]).tolist()) == list(range(10))
    for image, label in batches:
        expected = normalize(images.train.images[label], images.mean, images.std)
        assert torch.equal(image, expected)
    kept = list(images.train_epoch(4, seed=0, epoch=0, augmented=False, drop_last=True))
    assert len(kept) == images.batches(4, drop_last=True) == 2
    assert all(torch.equal(a, b) for one, two in zip(kept, batches[:2], strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_skipping_gives_the_same_batches(first):
    images = small(10)
    whole = list(images.train_epoch(4, seed=5, epoch=2))
    rest = list(images.train_epoch(4, seed=5, epoch=2, first=first))
    assert len(rest) == 3 - first
    for (image, label), (expected_image, expected_label) in zip(rest, whole[first:], strict=True):
        assert torch.equal(image, expected_image) and torch.equal(label, expected_label)


def test_epochs_depend_on_seed_and_epoch_alone():
    images = small(64)

    def content(seed, epoch):
        image, label = next(images.train_epoch(64, seed=seed, epoch=epoch))
        return image.double().sum((1, 2, 3)).tolist(), label.tolist()

    torch.manual_seed(1)
    first = content(0, 0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert content(0, 0) == first
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is neither read nor moved
    others = [content(0, 1), content(1, 0), content(1, 1)]
    assert all(other != first for other in others) and others[0] != others[1]
    assert len({epoch_seed(s, e) for s in range(50) for e in range(50)}) == 2500


def test_dtypes_and_test_batches():
    images = small(10)
    image, label = next(images.train_epoch(4, seed=0, epoch=0, dtype=torch.float64))
    assert image.dtype == torch.float64 and label.dtype == torch.int64
    batches = list(images.test_batches(2))
    assert [len(label) for _, label in batches] == [2, 1]
    assert torch.equal(torch.cat([i for i, _ in batches]), normalize(images.test.images, images.mean, images.std))


def test_mean_and_deviation_are_made_once(monkeypatch):
    """On a GPU to make one is to wait for it. Those that an evaluation made serve training."""
    made, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: (made.append(args), tensor(*args, **kwargs))[1])
    _per_channel.cache_clear()
    images = small(10)
    with torch.inference_mode():
        assert len(list(images.test_batches(2))) == 2
    for epoch in range(2):
        batches = [image for image, _ in images.train_epoch(4, seed=0, epoch=epoch)]
        assert len(batches) == 3 and not any(image.is_inference() for image in batches)
    assert [values for (values,) in made] == [images.mean, images.std]
    assert not _per_channel(images.mean, torch.float32, images.train.images.device).is_inference()
    monkeypatch.undo()
    _per_channel.cache_clear()


def test_refuses_inconsistent_tensors():
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    good = Split(images, labels)
    for bad, message in (
        (Split(images.float(), labels), "uint8"),
        (Split(images[:, :1], labels), r"\(N, 3, H, W\)"),
        (Split(images, labels[:3]), "4 > 0"),
        (Split(images, labels.int()), "int64"),
        (Split(images, labels + 1), r"expected in \[0, 4\), got 1 to 4"),
        (Split(images[:0], labels[:0]), "0 > 0"),
        (Split(images[..., :7], labels), r"\(N, 3, H, W\)"),
    ):
        with pytest.raises(DataError, match=message):
            ImageSet("tiny", good, bad, 4, (0.5,) * 3, (0.5,) * 3, Augmentation(1, "zeros", False))


def test_shrunk_images_are_averages():
    images = data.load("fashion_mnist")
    small = images.shrunk(4)
    assert small.image_size == 8 and small.train_count == images.train_count and small.mean == images.mean
    for split, of in ((small.train, images.train), (small.test, images.test)):
        exact = of.images[:50].double().unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
        assert torch.equal(split.images[:50], (exact + 0.5).floor().to(torch.uint8)) and torch.equal(split.labels, of.labels)
    with pytest.raises(DataError, match="shrink: expected a divisor of 32 and 32, got 5"):
        images.shrunk(5)


def test_held_out_images_are_trained_on_no_more():
    images = data.load("fashion_mnist")
    rest = images.held_out(1000)
    assert torch.equal(torch.cat([rest.train.images, rest.test.images]), images.train.images)
    assert torch.equal(torch.cat([rest.train.labels, rest.test.labels]), images.train.labels) and len(rest.test) == 1000
    with pytest.raises(DataError, match="hold_out: expected 1 to 7999 training images, got 8000"):
        images.held_out(8000)
