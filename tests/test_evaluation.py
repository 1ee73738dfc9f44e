"""Top-1 and top-5, mIoU at one scale, several and mirrored: equal to computations written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import infopro_fast
from infopro_fast.modules import IGNORE
from infopro_fast.trainer import evaluation
from tests import compare


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return infopro_fast.build("fcn_resnet20", 2, "softmax", num_classes=5, image_size=16).double()


def scenes(N=6, H=16, W=20, classes=5):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(N, 3, H, W, generator=generator, dtype=torch.float64)
    label = torch.randint(
        classes - 1, (N, H, W), generator=generator, dtype=torch.uint8
    )  # the last class never occurs
    label[:, :3] = IGNORE
    return image, label


def plain_miou(prediction: np.ndarray, label: np.ndarray, classes: int) -> tuple[float, list[float | None]]:
    """Sets of pixels, class by class."""
    each: list[float | None] = []
    kept = label != IGNORE
    for c in range(classes):
        a, b = (prediction == c) & kept, (label == c) & kept
        each.append(float((a & b).sum() / (a | b).sum()) if (a | b).any() else None)
    return float(np.mean([v for v in each if v is not None])), each


@pytest.mark.parametrize(
    "scales, flip",
    [((1.0,), False), ((1.0,), True), ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), False), ((0.5, 1.5), True)],
)
def test_miou(segmenter, scales, flip):
    image, label = scenes()
    found = evaluation.evaluate(
        segmenter, [(image[:4], label[:4]), (image[4:], label[4:])], scales=scales, flip=flip
    )
    net = segmenter.eval()
    total = torch.zeros(6, 5, 16, 20, dtype=torch.float64)
    with torch.no_grad():
        for scale in scales:
            x = F.interpolate(image, (round(16 * scale), round(20 * scale)), mode="bilinear")
            total += F.interpolate(net(x).float(), (16, 20), mode="bilinear").softmax(1)
            if flip:
                total += F.interpolate(net(x.flip(3)).float(), (16, 20), mode="bilinear").softmax(1).flip(3)
    prediction = total.argmax(1)
    miou, each = plain_miou(prediction.numpy(), label.numpy(), 5)
    assert found["miou"] == pytest.approx(miou, abs=1e-12) and found["count"] == 6
    assert [v is None for v in found["iou"]] == [v is None for v in each]
    assert [v for v in found["iou"] if v is not None] == pytest.approx(
        [v for v in each if v is not None], abs=1e-12
    )
    valid = label != IGNORE
    assert found["accuracy"] == pytest.approx(
        (prediction[valid] == label[valid]).double().mean().item(), abs=1e-12
    )
    mean = total / total.sum(1, keepdim=True)
    loss = F.nll_loss(mean.log().permute(0, 2, 3, 1)[valid], label[valid].long()).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert evaluation.headline(found) == ("mIoU", found["miou"])


def test_confusion_counts():
    counts = evaluation.confusion(
        torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 0, 1, IGNORE]]], dtype=torch.uint8), 3
    )
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    iou = evaluation.intersection_over_union(counts)
    assert iou[:2].tolist() == [0.5, 0.5] and iou[2].isnan()


def test_top1_and_top5():
    net = infopro_fast.build("resnet20", 2, "softmax", num_classes=12, lambdas=(1, 1, 0, 0)).double()
    image, label = torch.randn(9, 3, 32, 32, dtype=torch.float64), torch.arange(9)
    found = evaluation.evaluate(net, [(image[:5], label[:5]), (image[5:], label[5:])])
    assert net.training
    with torch.no_grad():
        logits = net.eval()(image)
    rank = (logits > logits.gather(1, label[:, None])).sum(1)
    assert found["accuracy"] == (rank == 0).double().mean() and found["top5"] == (rank < 5).double().mean()
    compare.assert_close(torch.tensor(found["loss"], dtype=torch.float64), F.cross_entropy(logits, label))
    two = infopro_fast.build("resnet20", 1, "none", num_classes=2)
    assert evaluation.evaluate(two, [(image.float(), label % 2)])["top5"] == 1
    with pytest.raises(ValueError, match="only segmentation"):
        evaluation.evaluate(net, [(image, label)], flip=True)
    with pytest.raises(ValueError, match="evaluate: batches: expected at least one image, got none"):
        evaluation.evaluate(net, [])
