"""ImageNet's and Cityscapes' layouts: tiny files of the true formats, augmentations, and workers."""

from __future__ import annotations

import math
import signal

import numpy as np
import pytest
import torch

from infopro_fast import data, errors
from infopro_fast.data import cityscapes, imagenet
from infopro_fast.errors import DataError
from infopro_fast.trainer import evaluate_run, fit, resume, run_folder
from infopro_fast.trainer.settings.config import TrainConfig
from tests import tiny_run

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def imagenet_root(tmp_path_factory):
    """3 classes with 4 training and 2 test images each, of different sizes."""
    root = tmp_path_factory.mktemp("imagenet")
    for part, count in (("train", 4), ("val", 2)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                size = (40 + 7 * i, 60 - 5 * i, 3)
                Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(
                    root / part / name / f"{name}_{i}.JPEG"
                )
    return root


@pytest.fixture(scope="module")
def cityscapes_root(tmp_path_factory):
    """Cities with images of 32x64 in the true layout; labels are train ids, 255 where nothing is labelled."""
    root = tmp_path_factory.mktemp("cityscapes")
    for part, cities in (("train", ("aachen", "bochum")), ("val", ("lindau",))):
        for city in cities:
            for kind in ("leftImg8bit", "gtFine"):
                (root / kind / part / city).mkdir(parents=True)
            for i in range(3):
                stem = f"{city}_{i:06d}_000019"
                label = np.repeat(rng.integers(0, 19, (4, 8), dtype=np.uint8), 8, 0).repeat(8, 1)
                label[:3] = 255
                image = np.stack([label, 255 - label, rng.integers(0, 256, label.shape, dtype=np.uint8)], -1)
                Image.fromarray(image).save(root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png")
                Image.fromarray(label).save(
                    root / "gtFine" / part / city / f"{stem}_gtFine_labelTrainIds.png"
                )
                Image.fromarray(label).save(
                    root / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png"
                )  # another file beside it
    return root


def batches(images, **kwargs):
    return list(images.train_epoch(4, **{"seed": 3, "epoch": 1, **kwargs}))


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for (a, b), (c, d) in zip(found, expected):
        assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.parametrize("name", ["imagenet", "cityscapes"])
def test_epochs_depend_on_seed_and_epoch_alone(name, request):
    """Workers, the process' generator and the first batch change no bit; seed and epoch do."""
    root = request.getfixturevalue(f"{name}_root")
    crop = (32, 32) if name == "imagenet" else (16, 32)
    images = data.load(name, root, crop=crop)
    torch.manual_seed(5)
    whole, state = batches(images), torch.get_rng_state()
    assert_same_batches(batches(data.load(name, root, crop=crop, workers=2)), whole)
    torch.manual_seed(6)
    assert_same_batches(batches(images, first=1), whole[1:])
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # the transforms leave it as it was
    for other in ({"seed": 4}, {"epoch": 2}):
        assert not torch.equal(batches(images, **other)[0][0], whole[0][0])
    assert (
        images.batches(5) == -(-images.train_count // 5)
        and images.batches(5, drop_last=True) == images.train_count // 5
    )
    assert not any(torch.equal(a, b) for a, b in zip(whole[0][0], batches(images, epoch=2)[0][0]))


def test_imagenet_crops(imagenet_root):
    """The crops equal the authors' transforms (torchvision's first API) on the same random numbers."""
    from torchvision import datasets, transforms

    images = imagenet.load(imagenet_root, crop=(32, 32))
    assert (images.num_classes, images.train_count, len(images.test), images.image_size) == (
        3,
        12,
        6,
        (32, 32),
    )
    theirs = datasets.ImageFolder(
        imagenet_root / "val",
        transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor(),
                            transforms.Normalize(imagenet.MEAN, imagenet.STD)]),
    )
    found = list(images.test_batches(4))
    torch.testing.assert_close(
        torch.cat([image for image, _ in found]), torch.stack([image for image, _ in theirs])
    )
    assert torch.cat([label for _, label in found]).tolist() == theirs.targets == [0, 0, 1, 1, 2, 2]
    picture = images.train[0][0]
    for seed in range(5):
        torch.manual_seed(seed)
        ours, _ = images.train_transform(picture, 0)
        torch.manual_seed(seed)
        first = transforms.Compose(
            [transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        )
        assert torch.equal(ours, first(picture))
    plain = batches(images, augmented=False)
    assert all(image.shape[1:] == (3, 32, 32) for image, _ in plain)


def test_cityscapes_content(cityscapes_root):
    images = cityscapes.load(cityscapes_root, crop=(16, 32))
    assert (images.num_classes, images.train_count, images.dense) == (19, 6, True)
    found = list(images.test_batches(4))
    assert [tuple(image.shape) for image, _ in found] == [(1, 3, 32, 64)] * 3
    for image, label in found:
        assert label.dtype == torch.uint8 and label.shape == (1, 32, 64) and (label[:, :3] == 255).all()
        red = image[:, 0] * cityscapes.STD[0] + cityscapes.MEAN[0]
        assert torch.equal(
            (red * 255).round().to(torch.uint8), label
        )  # red was drawn as the label: the pairs fit


def test_cityscapes_augmentation(cityscapes_root):
    """Image and label are augmented alike; crops avoid a single class; padding is ignored."""
    images = cityscapes.load(cityscapes_root, crop=(16, 32))
    images.train_transform.distort = torch.nn.Identity()  # so that red still is the label
    agree, flips = [], 0
    for index in range(6):
        for seed in range(10):
            torch.manual_seed(100 * index + seed)
            image, label = images.train_transform(*images.train[index])
            assert (
                image.shape == (3, 16, 32)
                and label.shape == (16, 32)
                and image.dtype == label.dtype == torch.uint8
            )
            agree.append(((image[0] == label) | (label == 255)).float().mean().item())
            counts = torch.bincount(label[label != 255].long())
            flips += counts.max() / counts.sum() >= 0.75 or (counts > 0).sum() < 2
    assert sum(agree) / len(agree) > 0.6  # not at the edges, where the image is interpolated
    assert flips == 0
    large = cityscapes.Augmented((96, 256))
    torch.manual_seed(0)
    image, label = large(*images.train[0])
    outside = label == 255
    assert outside[80:].all() and (image[:, -1, -1] == torch.tensor(cityscapes.MEAN_COLOUR)).all()


def test_distortion_is_drawn_in_its_ranges():
    """Each step applies half of the time, over its whole range; contrast comes first as often as last."""
    torch.manual_seed(0)
    draws = [cityscapes.Distortion().draw() for _ in range(2000)]
    for name, (low, high) in {
        "brightness": (-32, 32),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-0.1, 0.1),
    }.items():
        amounts = [dict(draw)[name] for draw in draws if name in dict(draw)]
        assert 900 < len(amounts) < 1100
        margin = 0.01 * (high - low)
        assert low <= min(amounts) < low + margin and high - margin < max(amounts) <= high
    orders = [[name for name, _ in draw] for draw in draws]
    assert all(order[0] == "brightness" for order in orders if "brightness" in order)
    for other in ("saturation", "hue"):
        both = [
            order.index("contrast") < order.index(other)
            for order in orders
            if {"contrast", other} <= set(order)
        ]
        assert 0.4 < sum(both) / len(both) < 0.6


@pytest.mark.parametrize(
    "name, amount",
    [("brightness", -31.5), ("brightness", 30.2), ("contrast", 0.6), ("contrast", 1.5), ("saturation", 0.5),
     ("saturation", 1.5), ("hue", -0.1), ("hue", 0.04)],
)
def test_distortion_by_the_pixel(name, amount):
    """Equals Python's colorsys, within the unit and a half that fractions may take."""
    import colorsys

    image = torch.randint(256, (3, 9, 11), dtype=torch.uint8)
    image[:, 0] = image[:1, 0]  # greys
    before = image.clone()
    found = cityscapes.distorted(image, name, amount)
    assert torch.equal(image, before) and found.dtype == torch.uint8 and found.shape == image.shape
    for pixel, got in zip(image.flatten(1).T.tolist(), found.flatten(1).T.tolist()):
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
        if name == "brightness":
            expected = [value + amount for value in pixel]
        elif name == "contrast":
            expected = [value * amount for value in pixel]
        else:
            h, s = ((h + amount) % 1, s) if name == "hue" else (h, min(1.0, s * amount))
            expected = [255 * value for value in colorsys.hsv_to_rgb(h, s, v)]
        assert [min(255, max(0, value)) for value in expected] == pytest.approx(got, abs=1.5)


def test_distortion_keeps_grey_and_the_order_of_channels():
    distort, grey = (
        cityscapes.Distortion(),
        torch.arange(48, 176, dtype=torch.uint8).view(1, 8, 16).repeat(3, 1, 1),
    )
    reddish = torch.tensor([150, 90, 80], dtype=torch.uint8)[:, None, None].repeat(1, 4, 4)
    changed = 0
    for seed in range(200):
        torch.manual_seed(seed)
        found = distort(grey)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        changed += not torch.equal(found, grey)
        torch.manual_seed(seed)
        assert torch.equal(distort(grey), found)
        red, green, blue = distort(reddish)[:, 0, 0].tolist()
        assert red >= max(green, blue)  # a turn of 36 degrees leaves red the largest
    assert 100 < changed < 200


def test_what_is_missing_is_named(imagenet_root, cityscapes_root, tmp_path):
    for name, message in (
        ("imagenet", "train not found"),
        ("cityscapes", "no <city>/\\*_leftImg8bit.png found"),
    ):
        with pytest.raises(DataError, match=message):
            data.load(name, tmp_path)
        with pytest.raises(DataError, match="cannot be fetched"):
            data.load(name, imagenet_root, download=True)
    label = next((cityscapes_root / "gtFine" / "val").glob("*/*labelTrainIds.png"))
    aside = label.with_suffix(".aside")
    label.rename(aside)
    try:
        with pytest.raises(DataError, match=f"{label.name} not found; cityscapesScripts"):
            data.load("cityscapes", cityscapes_root)
    finally:
        aside.rename(label)
    for part in ("train", "val"):
        (tmp_path / part / ("cat" if part == "train" else "dog")).mkdir(parents=True)
    with pytest.raises(DataError, match="imagenet: .*train: .*cat"):
        data.load("imagenet", tmp_path)
    for folder in ("train/cat", "val/dog"):
        Image.new("RGB", (40, 40)).save(tmp_path / folder / "1.png")
    with pytest.raises(DataError, match="train and val have different classes: cat, dog"):
        data.load("imagenet", tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Runs on such folders

RUNS = {
    "imagenet": dict(
        arch="resnet18", cuts=((2, 1),), lambdas=(1, 1, 1, 1), crop=(64, 64), batch_size=8, epochs=1, lr=0.01,
        log_every=2, threads=1
    ),
    "cityscapes": dict(
        arch="fcn_resnet20", lambdas=(1, 1, 1, 1), crop=(32, 64), batch_size=2, iterations=5, lr=0.01,
        log_every=2, threads=1
    ),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.fast(1)
def test_a_run_is_evaluated_and_continued(name, request, tmp_path, monkeypatch):
    """A run that stops halfway and resumes, with another number of workers, ends in the same bits."""
    settings = dict(dataset=name, data_root=request.getfixturevalue(f"{name}_root"), **RUNS[name])
    alone = fit(TrainConfig(out=tmp_path / "alone", workers=0, **settings))
    config, epochs = run_folder.read_config(alone), run_folder.read_metrics(alone, "epoch")
    last, stop = ((1, 2), 1) if name == "imagenet" else ((2, 2), 4)  # epochs of 12 images by 8, and of 6 by 2
    assert [(s["epoch"], s["batch"]) for s in run_folder.read_metrics(alone, "step")][-1] == last
    assert (config.epochs, config.iterations, config.modules) == (
        last[0],
        RUNS[name].get("iterations"),
        2,
    ) and len(epochs) == last[0]
    assert all(math.isfinite(value) for epoch in epochs for value in epoch["train"].values())
    assert epochs[-1]["train"].keys() >= {"module1/reconstruction", "module1/softmax", "loss"}
    test = epochs[-1]["test"]
    assert test == evaluate_run(alone)
    if name == "imagenet":
        assert (
            test["count"] == 6
            and test["top5"] == 1
            and test["accuracy"] * 6 == pytest.approx(round(test["accuracy"] * 6))
        )
    else:
        assert test["count"] == 3 and len(test["iou"]) == 19 and config.drop_last
        mirrored = evaluate_run(alone, scales=(0.5, 1.0), flip=True)
        assert mirrored["count"] == 3 and mirrored["loss"] != test["loss"]
    with monkeypatch.context() as patch:
        tiny_run.at_step(patch, stop, lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(errors.Stopped):
            fit(TrainConfig(out=tmp_path / "run", workers=1, **settings))
    tiny_run.assert_same_weights(resume(tmp_path / "run"), alone)
    assert run_folder.read_metrics(tmp_path / "run", "epoch")[-1]["test"] == test


# ------------------------------------------------------------------------------------------------------------
# The embedded scenes


def test_scenes():
    """11 classes, ignored outlines, mean and std of the images; every load gives the same scenes."""
    from infopro_fast.data import shapes_seg

    images = data.load("shapes_seg")
    assert images.dense and images.num_classes == 11 and images.train.images.shape == (2000, 3, 48, 48)
    pixels = images.train.images.double() / 255
    torch.testing.assert_close(
        pixels.mean((0, 2, 3)), torch.tensor(shapes_seg.MEAN).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        pixels.std((0, 2, 3)), torch.tensor(shapes_seg.STD).double(), atol=1e-4, rtol=0
    )
    for split in (images.train, images.test):
        share = torch.bincount(split.labels.flatten().long(), minlength=256) / split.labels.numel()
        assert (
            share[0] < 0.75
            and share[1:11].min() > 0.005
            and 0.05 < share[255] < 0.15
            and share[11:255].sum() == 0
        )
    shapes_seg.load.cache_clear()
    again = shapes_seg.load()
    assert torch.equal(again.train.labels, images.train.labels) and torch.equal(
        again.test.images, images.test.images
    )
    with pytest.raises(DataError, match="expected below 11 or 255, got up to 11"):
        wrong = data.Split(again.test.images, torch.full_like(again.test.labels, 11))
        data.SegmentationSet("x", wrong, again.test, 11, (0,) * 3, (1,) * 3, images.augmentation)


def test_silhouettes():
    from infopro_fast.data import shapes_seg

    grey = torch.zeros(1, 7, 9, dtype=torch.uint8)
    grey[0, 1, 1:6] = grey[0, 5, 1:6] = grey[0, 1:6, 1] = grey[0, 1:6, 5] = 200  # a ring: filled
    grey[0, 2:6, 7] = 200  # a bar beside it: what is between them is open above
    inside = shapes_seg.silhouettes(grey)[0]
    assert inside[1:6, 1:6].all() and inside[2:6, 7].all() and inside.sum() == 25 + 4
    border = shapes_seg.outline(inside)
    assert border[1, 1] and border[0, 3] and not border[3, 3] and border[3, 6]


def test_masks_are_augmented_like_their_images():
    from dataclasses import replace

    from infopro_fast.data import Augmentation

    images = data.load("shapes_seg")
    part = data.Split(
        images.test.labels[:8, None].repeat(1, 3, 1, 1), images.test.labels[:8]
    )  # images that show their labels
    images = replace(
        images, train=part, test=part, augmentation=Augmentation(padding=5, mode="zeros", flip=True)
    )
    flipped = 0
    for image, label in images.uint8_batches(4, 0, 0, 0, False, True, (0, 1)):
        padded = (label == 255) & (image[:, 0] == 0)
        assert torch.equal(torch.where(padded, 255, image[:, 0]), label)
        flipped += sum(not torch.equal(one, two) for one, two in zip(label, images.train.labels))
    assert flipped
