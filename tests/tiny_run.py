"""A run that takes seconds: the embedded set cut down to a few images, a small network, one thread."""

from dataclasses import replace

from infopro_fast.data import Split, fashion_mnist
from infopro_fast.trainer.config import TrainConfig

TRAIN, TEST, BATCH = 52, 20, 16  # 4 batches an epoch, the last of 4 images
_load = fashion_mnist.load


def load():
    images = _load()
    train, test = images.train, images.test
    return replace(images, train=Split(train.images[:TRAIN], train.labels[:TRAIN]), test=Split(test.images[:TEST], test.labels[:TEST]))


def config(out, **settings) -> TrainConfig:
    defaults = dict(arch="resnet20", modules=3, lambdas=(1, 0, 1, 1), epochs=3, warmup=1, batch_size=BATCH, lr=0.05, log_every=3, threads=1)
    return TrainConfig(out=out, **{**defaults, **settings})
