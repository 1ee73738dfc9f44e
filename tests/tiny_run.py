"""A run that takes seconds: a few embedded images, a small network, one thread; and helpers for runs."""

from dataclasses import replace

import safetensors.torch
import torch

from infopro_fast.data import Split, fashion_mnist
from infopro_fast.trainer import curve, run_folder
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.step import LocalTrainer

TRAIN, TEST, BATCH = 52, 20, 16  # 4 batches an epoch, the last of 4 images
_load = fashion_mnist.load


def load():
    images = _load()
    train, test = images.train, images.test
    return replace(
        images,
        train=Split(train.images[:TRAIN], train.labels[:TRAIN]),
        test=Split(test.images[:TEST], test.labels[:TEST]),
    )


def small_and_plain() -> None:
    """Use the images above, and empty learning curves (half of such a run's time), for good."""
    images = load()
    fashion_mnist.load = lambda: images
    curve.draw_learning_curve = lambda folder, title: (folder / run_folder.CURVE).touch()


def config(out, **settings) -> TrainConfig:
    defaults = dict(
        arch="resnet20",
        modules=3,
        lambdas=(1, 0, 1, 1),
        epochs=3,
        warmup=1,
        batch_size=BATCH,
        lr=0.05,
        log_every=3,
        threads=1,
    )
    return TrainConfig(out=out, **{**defaults, **settings})


def weights(run):
    return safetensors.torch.load_file(run / "weights.safetensors")


def assert_same_weights(run, other):
    expected, got = weights(run), weights(other)
    assert list(expected) == list(got) and all(
        torch.equal(got[name], tensor) for name, tensor in expected.items()
    )


def at_step(monkeypatch, number, action):
    """Run ``action`` right after the trainer's ``number``-th step; what it returns replaces the metrics."""
    step, count = LocalTrainer.step_from, 0

    def patched(self, *batch):
        nonlocal count
        count += 1
        features, metrics = step(self, *batch)
        return features, (action(self, metrics) or metrics) if count == number else metrics

    monkeypatch.setattr(LocalTrainer, "step_from", patched)
