"""What a run is made of: images, network, machine and generators, from its settings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from infopro_fast import data, modules, ops
from infopro_fast.errors import ConfigError

from . import schedule
from .settings.config import TrainConfig


def amp_dtype(config: TrainConfig) -> torch.dtype | None:
    """Return the dtype of autocast, or None."""
    return None if config.amp == "none" else getattr(torch, config.amp)


def autocast(config: TrainConfig) -> contextlib.AbstractContextManager:
    """Return the context that a run's forwards run in."""
    if config.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, amp_dtype(config))


def optimizer(config: TrainConfig) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """Return `LocalTrainer`'s make_optimizer."""
    c = config
    return schedule.released_sgd(c.lr, c.momentum, c.weight_decay, c.nesterov)


def load_init(net: modules.LocalNetwork, path: Path) -> None:
    """Copy the weights in ``path`` that fit by name and shape. Raises ConfigError if none fits."""
    own, state, copied = net.released_state_dict(), _read_init(path), 0
    with torch.no_grad():
        for name, tensor in state.items():
            for known in (name, name.removeprefix("module."), f"backbone.{name.removeprefix('module.')}"):
                if known in own and isinstance(tensor, torch.Tensor) and own[known].shape == tensor.shape:
                    own[known].copy_(tensor)
                    copied += 1
                    break
    if not copied:
        what = f"none of its {len(state)} entries has the name and shape of a weight of this network"
        raise ConfigError(f"init {path}: {what}")


def _read_init(path: Path) -> dict[str, Any]:
    """Return the contents of a file of weights, by name. Raises ConfigError naming a file of another kind."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # another file can fail in any way: as a pickle, a zip archive, a JSON header
        why = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"init {path}: not a file of weights: {type(error).__name__}: {why}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        what = f"expected tensors by name, got {type(state).__name__}"
        raise ConfigError(f"init {path}: not a file of weights: {what}")
    return state


def check_batches(config: TrainConfig, images: data.ImageSet | data.FolderSet, replicas: int = 1) -> None:
    """Raise ConfigError where a head of DGL, whose batch norms see images alone, would get a single image.

    replicas: processes that share a batch; each goes through its part in ``accumulate`` parts.
    """
    if config.loss != "dgl" or config.modules == 1 or (config.sync_batch_norm and replicas > 1):
        return
    size, count = config.batch_size, images.train_count
    for batch in {min(size, count), 0 if config.drop_last else count % size} - {0}:
        for own in {batch // replicas, -(-batch // replicas)} - {0}:
            part = -(-own // config.accumulate)  # as `Tensor.chunk` cuts
            if 1 in (part, own % part):
                raise ConfigError(
                    f"local_loss dgl: the batch norms of its heads need 2 images, and {count} in batches of "
                    f"{size} leave 1 alone (other batch_size, accumulate or number of processes? drop_last?)"
                )


def load_data(config: TrainConfig) -> data.ImageSet | data.FolderSet:
    """Return the run's images. Raises DataError or ConfigError."""
    c = config
    images: Any = data.load(c.dataset, c.data_root, c.download, crop=c.crop, workers=c.workers or 0)
    if config.shrink > 1:
        images = images.shrunk(config.shrink)
    if config.hold_out > 0:
        images = images.held_out(config.hold_out)
    if images.batches(config.batch_size, config.drop_last) == 0:
        count = f"there are only {images.train_count} training images"
        raise ConfigError(f"batch_size {config.batch_size} and drop_last: {count}")
    return images


def build(config: TrainConfig, images: data.ImageSet | data.FolderSet) -> modules.LocalNetwork:
    """Return the run's network, on its device. Raises ConfigError."""
    c = config
    if config.impl != "auto":
        # Triton has kernels for every op, CUDA C++ for some: `modules.build` asks for no others.
        for op in (op for op in ops.OPS if config.impl != "cuda" or ops.has_kernels(op, "cuda")):
            reason = ops.available(op, config.device)[config.impl]
            if reason is not None:
                raise ConfigError(f"impl {config.impl}: {op}: {reason}")
    try:
        net = modules.build(
            c.arch, c.modules, c.local_loss, c.lambdas, c.balanced, images.num_classes, images.image_size,
            images.mean, images.std, cuts=c.cuts, net_config=c.net_config, widen=c.widen,
            feature_dim=c.feature_dim, aux_depth=c.aux_depth, label_smoothing=c.label_smoothing,
            pixel_reduction=c.pixel_reduction, recompute=c.recompute, impl=c.impl,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error).removeprefix("build: ")) from error
    return net.to(config.device, getattr(torch, config.dtype))


@contextlib.contextmanager
def machine(config: TrainConfig) -> Iterator[None]:
    """Give a run its thread count, kernels that repeat to the bit, and generators, while it lasts."""
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise ConfigError(f"device {config.device}: {str(error).splitlines()[0]}") from error
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=config.tf32
            ),
        ):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def first_network(config: TrainConfig, images: data.ImageSet | data.FolderSet) -> modules.LocalNetwork:
    """Return the network that a run with these settings begins with; torch's generator goes on from there."""
    torch.manual_seed(config.seed)
    net = build(config, images)
    if config.init is not None:
        load_init(net, config.init)
    return net


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of torch's generators that a run on this device uses."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
