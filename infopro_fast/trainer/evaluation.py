"""Evaluation of a network: top-1 and top-5 of classification, mean intersection over union of segmentation.

mIoU comes from a matrix of confusion counts over all pixels of all images, as Cityscapes does. Outputs may be
averaged over scales and flips of the image: each is resized to the image, then softmax, then the mean
(mmsegmentation's aug_test).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    """Return the metrics of the network in eval mode over batches of (image, label); restores its mode.

    Classification: {"accuracy", "top5", "loss", "count"}: shares of the images in [0, 1], mean cross entropy,
    images.
    Segmentation: {"miou", "accuracy", "loss", "count", "iou"}: mean over the classes that occur, share of
    right pixels, mean cross entropy of a pixel (at the image's own scale), images, IoU of each class (None if
    it does not occur).
    scales, flip: for segmentation, the image sizes to average over, and whether each is mirrored too. Waits
    for the device once, at the end. Raises ValueError if there is no image.
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


def send_on(
    net: LocalNetwork, packets: Iterable, outlet, autocast: Callable[[], contextlib.AbstractContextManager]
) -> None:
    """Run one process's modules in an evaluation, and send each batch's features on (outlet: a `Sender`)."""
    training = net.training
    net.eval()
    outlet.begin()
    try:
        with torch.inference_mode(), autocast():
            for packet in packets:
                h = packet.features
                for stage in net.stages:
                    h = stage(h)
                outlet.send(packet._replace(features=h, image=None, metrics={}, request=None))
            outlet.flush()
    finally:
        net.train(training)


def headline(found: dict[str, float]) -> tuple[str, float]:
    """Return the name and the value of the metric that a run is judged by."""
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


def _segmentation(
    net: LocalNetwork, batches: Batches, scales: tuple[float, ...], flip: bool
) -> dict[str, float]:
    counts, count, plain = None, 0, scales == (1.0,) and not flip
    loss_sum: float | torch.Tensor = 0.0
    end = net.classifier
    for image, label in batches:
        if plain:
            loss, found = ops.upsample_cross_entropy(
                net(image), label, align_corners=end.align_corners, ignore_index=IGNORE,
                return_confusion=True, impl=end.impl,
            )
        else:
            chances = class_probabilities(net, image, label.shape[-2:], scales, flip)
            found = confusion(chances.argmax(1), label, chances.shape[1])
            logs = chances.clamp(min=1e-30).log()
            loss = F.nll_loss(logs, label.long(), ignore_index=IGNORE, reduction="sum")
            loss = loss / found.sum().clamp(min=1)
        counts = found if counts is None else counts + found
        loss_sum, count = loss_sum + loss.double() * found.sum(), count + len(label)
    _check(count)
    iou = intersection_over_union(counts)
    pixels = counts.sum().clamp(min=1)
    occurs = ~iou.isnan()
    mean = torch.where(occurs, iou, 0).sum() / occurs.sum().clamp(min=1)
    right = counts.diagonal().sum().double()
    found = torch.cat([torch.stack([mean, right / pixels, loss_sum / pixels]), iou])
    miou, accuracy, loss, *each = found.tolist()
    ious = [None if v != v else v for v in each]
    return {"miou": miou, "accuracy": accuracy, "loss": loss, "count": count, "iou": ious}


def confusion(prediction: torch.Tensor, label: torch.Tensor, classes: int) -> torch.Tensor:
    """Return (C, C) int64 counts of pixels by label (row) and prediction (column), without label IGNORE.

    prediction, label: (N, H, W) integers.
    """
    kept = label != IGNORE
    pair = torch.where(kept, label.long() * classes + prediction, 0).flatten()
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=pair.device)
    return counts.scatter_add_(0, pair, kept.flatten().long()).view(classes, classes)


def intersection_over_union(counts: torch.Tensor) -> torch.Tensor:
    """Return each class's IoU, float64 (C,), from confusion counts; nan if neither labelled nor predicted."""
    counts = counts.double()
    both = counts.diagonal()
    return both / (counts.sum(0) + counts.sum(1) - both)


def class_probabilities(
    net: LocalNetwork, image: torch.Tensor, size: Sequence[int], scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> torch.Tensor:
    """Return (N, C, *size): softmax of the resized logits, averaged over the scaled and mirrored images.

    image: (N, 3, H, W), normalised.
    """
    H, W = image.shape[-2:]
    corners = net.classifier.align_corners
    total: Any = 0.0
    for scale in scales:
        scaled = image
        if scale != 1:
            size_here = round(scale * H), round(scale * W)
            scaled = F.interpolate(image, size_here, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            logits = net(scaled.flip(-1) if mirrored else scaled)
            logits = F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=corners)
            chances = logits.softmax(1)
            total = total + (chances.flip(-1) if mirrored else chances)
    return total / (len(scales) * (2 if flip else 1))


def _check(count: int) -> None:
    if count == 0:
        raise ValueError("evaluate: batches: expected at least one image, got none")
