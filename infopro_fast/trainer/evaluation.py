"""Evaluation of a network: top-1 and top-5 of classification; mean intersection over union of segmentation.

mIoU is taken from a matrix of confusion counts over all pixels of all images (as Cityscapes does), with the outputs averaged over
scales and flips of the image where asked: every one resized to the image, softmax, mean (mmsegmentation's aug_test).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from infopro_fast import ops
from infopro_fast.modules import IGNORE, LocalNetwork

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def evaluate(
    net: LocalNetwork,
    batches: Batches,
    *,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> dict[str, float]:
    """The network in eval mode over batches of (image, label); one wait for the device, at the end. Its mode is put back.

    Classification: {"accuracy", "top5", "loss", "count"}: shares of the images in [0, 1], mean cross entropy, number of images.
    Segmentation: {"miou", "accuracy", "loss", "count", "iou"}: mean over the classes that occur, share of right pixels, mean cross
    entropy of a pixel (of the image as it is), number of images, IoU of every class (None where it does not occur).
    scales, flip: of segmentation; sizes of the image to average over, and whether each is mirrored too.

    Raises ValueError if there is no image.
    """
    training = net.training
    net.eval()
    try:
        with torch.inference_mode(), autocast():
            if net.classifier.dense:
                return _segmentation(net, batches, tuple(scales), flip)
            if tuple(scales) != (1.0,) or flip:
                raise ValueError("evaluate: scales, flip: only segmentation is averaged over them")
            return _classification(net, batches)
    finally:
        net.train(training)


def send_on(net: LocalNetwork, packets: Iterable, outlet, autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
    """The modules of one process in an evaluation: every batch's features go to the process behind (`pipeline.Sender`)."""
    training = net.training
    net.eval()
    outlet.begin()
    try:
        with torch.inference_mode(), autocast():
            for packet in packets:
                h = packet.features
                for stage in net.stages:
                    h = stage(h)
                outlet.send(packet._replace(request=None, metrics={}, image=None, features=h))
            outlet.flush()
    finally:
        net.train(training)


def headline(found: dict[str, float]) -> tuple[str, float]:
    """The number that a run is judged by, and its name."""
    return ("mIoU", found["miou"]) if "miou" in found else ("accuracy", found["accuracy"])


def _classification(net: LocalNetwork, batches: Batches) -> dict[str, float]:
    sums, count = None, 0
    for image, label in batches:
        logits, label = net(image), label.long()
        best = logits.topk(min(5, logits.shape[1]), 1).indices
        right = best == label[:, None]
        loss = F.cross_entropy(logits.double(), label, reduction="sum")
        found = torch.stack([right[:, 0].sum().double(), right.sum().double(), loss])
        sums, count = found if sums is None else sums + found, count + len(label)
    _check(count)
    correct, top5, loss = (sums / count).tolist()
    return {"accuracy": correct, "top5": top5, "loss": loss, "count": count}


def _segmentation(net: LocalNetwork, batches: Batches, scales: tuple[float, ...], flip: bool) -> dict[str, float]:
    counts, loss_sum, count, plain = None, 0.0, 0, scales == (1.0,) and not flip
    end = net.classifier
    for image, label in batches:
        if plain:
            loss, found = ops.upsample_cross_entropy(
                net(image), label, align_corners=end.align_corners, ignore_index=IGNORE, return_confusion=True, impl=end.impl
            )
        else:
            chances = class_probabilities(net, image, label.shape[-2:], scales, flip)
            found = confusion(chances.argmax(1), label, chances.shape[1])
            loss = F.nll_loss(chances.clamp(min=1e-30).log(), label.long(), ignore_index=IGNORE, reduction="sum") / found.sum().clamp(min=1)
        counts = found if counts is None else counts + found
        loss_sum, count = loss_sum + loss.double() * found.sum(), count + len(label)
    _check(count)
    iou = intersection_over_union(counts)
    pixels = counts.sum().clamp(min=1)
    occurs = ~iou.isnan()
    mean = torch.where(occurs, iou, 0).sum() / occurs.sum().clamp(min=1)
    right = counts.diagonal().sum().double()
    miou, accuracy, loss, *each = torch.cat([torch.stack([mean, right / pixels, loss_sum / pixels]), iou]).tolist()
    return {"miou": miou, "accuracy": accuracy, "loss": loss, "count": count, "iou": [None if v != v else v for v in each]}


def confusion(prediction: torch.Tensor, label: torch.Tensor, classes: int) -> torch.Tensor:
    """(C, C) int64: pixels by label (row) and prediction (column); those labelled IGNORE are left out. Both (N, H, W) integers."""
    kept = label != IGNORE
    pair = torch.where(kept, label.long() * classes + prediction, 0).flatten()
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=pair.device)
    return counts.scatter_add_(0, pair, kept.flatten().long()).view(classes, classes)


def intersection_over_union(counts: torch.Tensor) -> torch.Tensor:
    """Of each class, float64 (C,), from a confusion matrix; nan for a class that is neither labelled nor predicted."""
    counts = counts.double()
    both = counts.diagonal()
    return both / (counts.sum(0) + counts.sum(1) - both)


def class_probabilities(
    net: LocalNetwork, image: torch.Tensor, size: Sequence[int], scales: Sequence[float] = (1.0,), flip: bool = False
) -> torch.Tensor:
    """(N, C, *size): softmax of the resized logits, the mean over the scaled and mirrored images. image: (N, 3, H, W), normalised."""
    H, W = image.shape[-2:]
    total, corners = 0.0, net.classifier.align_corners
    for scale in scales:
        scaled = image
        if scale != 1:
            scaled = F.interpolate(image, (round(scale * H), round(scale * W)), mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            logits = net(scaled.flip(-1) if mirrored else scaled)
            chances = F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=corners).softmax(1)
            total = total + (chances.flip(-1) if mirrored else chances)
    return total / (len(scales) * (2 if flip else 1))


def _check(count: int) -> None:
    if count == 0:
        raise ValueError("evaluate: batches: expected at least one image, got none")
