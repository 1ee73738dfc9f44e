"""What `LocalTrainer` refuses: checked in one place, before a weight or a statistic has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from infopro_fast.modules import IGNORE, ChainDecoder, Decoder, InfoPro, InfoProL, LocalNetwork
from infopro_fast.ops.plain import differs
from infopro_fast.ops.reconstruction_loss import image_target


def check_trainer(net: Any, make_optimizer: Any) -> None:
    """Raise TypeError for what is no network of `build`, and for an optimizer in place of what makes one.

    ValueError: a call of the network does more than run its modules one by one, as a step does.
    """
    if not isinstance(net, LocalNetwork):
        got = f"got {type(net).__name__}: split it first, net = infopro_fast.build(net, cuts=[...])"
        raise TypeError(f"LocalTrainer: net: expected a network from infopro_fast.build, {got}")
    if reason := differs(net, type(net)):
        what = "a network whose call runs its modules and nothing else, as a step does"
        raise ValueError(f"LocalTrainer: net: expected {what}; {reason}: change a stage or a layer instead")
    if isinstance(make_optimizer, torch.optim.Optimizer) or not callable(make_optimizer):
        kind = type(make_optimizer).__name__
        how = f"such as lambda params: torch.optim.{kind}(params, lr=0.1)"
        what = "expected a function that makes an optimizer for each module's parameters"
        raise TypeError(f"LocalTrainer: make_optimizer: {what}, {how}; got {kind}")


def has_values(t: torch.Tensor) -> bool:
    """Whether a look at a tensor costs nothing: it is on the CPU, and has values."""
    return t.device.type == "cpu" and not isinstance(t, FakeTensor)


def check_batch(net: LocalNetwork, image: Any, label: Any, *, amp: bool, finite: bool) -> None:
    """Raise TypeError or ValueError, naming the argument, for a batch that ``net`` cannot be trained on.

    amp: any floating-point image will do. finite: look for a nan or an infinity. Labels are looked at on the
    CPU alone; elsewhere the check would wait for the device.
    """
    like = next(p for p in net.parameters() if p.is_floating_point())
    for name, t in (("image", image), ("label", label)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"step: {name}: expected a tensor, got {type(t).__name__}")
        if t.device != like.device:
            raise ValueError(f"step: {name}: expected it on {like.device} as the network, got {t.device}")
    size = _image_size(net)
    fits = image.dim() == 4 and image.shape[1] == 3 and size in (None, tuple(image.shape[2:]))
    if not fits or image.numel() == 0:
        expected = "(N, 3, {}, {}) with N > 0".format(*(size or ("H", "W")))
        raise ValueError(f"step: image: expected {expected}, got {tuple(image.shape)}")
    if image.dtype != like.dtype and not (amp and image.is_floating_point()):
        raise TypeError(f"step: image: expected {like.dtype} as the network's weights, got {image.dtype}")
    if label.is_floating_point() and label.dim() == 2 and not net.classifier.dense:
        _check_probabilities(net, label, len(image))
    else:
        _check_labels(net, label, len(image))
    if finite and not image.isfinite().all():
        bad = (~image.isfinite()).flatten(1).any(1).nonzero()[0].item()
        raise FloatingPointError(f"image: expected finite numbers, got a nan or an infinity in image {bad}")
    decoder = _image_decoder(net)
    if decoder is not None and has_values(image):
        with torch.no_grad():  # the decoder would refuse it only after the first module's forward
            image_target(image, decoder.options["image_mean"], decoder.options["image_std"])


def _check_labels(net: LocalNetwork, label: torch.Tensor, count: int) -> None:
    dense = net.classifier.dense
    if label.dim() != (3 if dense else 1) or len(label) != count:
        expected = f"({count}, H, W), a label for each pixel" if dense else f"({count},)"
        raise ValueError(f"step: label: expected {expected}, got {tuple(label.shape)}")
    if label.dtype == torch.bool or label.is_floating_point() or label.is_complex():
        raise TypeError(f"step: label: expected an integer tensor, got {label.dtype}")
    if has_values(label) and net.num_classes is not None:
        ignored = IGNORE if dense else -100
        wrong = label[((label < 0) | (label >= net.num_classes)) & (label != ignored)]
        if len(wrong):
            expected = f"integers in [0, {net.num_classes}), or {ignored} for none"
            raise ValueError(f"step: label: expected {expected}, got {wrong[0].item()}")


def _check_probabilities(net: LocalNetwork, label: torch.Tensor, count: int) -> None:
    """Class probabilities, as MixUp and CutMix make them. The contrastive loss has no use for them."""
    shape = (count, net.num_classes or label.shape[1])
    if tuple(label.shape) != shape:
        raise ValueError(f"step: label: expected class probabilities {shape}, got {tuple(label.shape)}")
    if any(isinstance(t, InfoPro) and t.task == "contrast" and t.task_weight for t in net.local_losses):
        expected = "integers for the contrastive loss (local_loss='softmax' takes class probabilities)"
        raise ValueError(f"step: label: expected {expected}, got {label.dtype} of {shape}")
    if has_values(label):
        wrong = label[~((label >= 0) & label.isfinite())]
        if len(wrong):
            raise ValueError(f"step: label: expected probabilities of at least 0, got {wrong[0].item()}")


def _image_decoder(net: LocalNetwork) -> Decoder | ChainDecoder | None:
    """Return a decoder that restores the image, if one runs."""
    running = (loss for loss in net.local_losses if isinstance(loss, InfoPro) and loss.reconstruction_weight)
    decoders = (loss.decoder for loss in running)
    return next((one for one in decoders if isinstance(one, (Decoder, ChainDecoder))), None)


def _image_size(net: LocalNetwork) -> tuple[int, int] | None:
    """Return the size of the images that a decoder restores; None where any size will do."""
    for loss in net.local_losses:
        if isinstance(loss, InfoPro) and loss.reconstruction_weight and isinstance(loss.decoder, Decoder):
            return loss.decoder.image_size, loss.decoder.image_size
        if isinstance(loss, InfoProL) and loss is net.local_losses[0]:  # restores the image, its input
            return loss.decoder.size
    return None
