"""What a run is made of: images, network and machine, as its config says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from infopro_fast import data, modules, ops
from infopro_fast.errors import ConfigError

from .settings.config import TrainConfig


def amp_dtype(config: TrainConfig) -> torch.dtype | None:
    """What autocast rounds to, or None."""
    return None if config.amp == "none" else getattr(torch, config.amp)


def load_init(net: modules.LocalNetwork, path: Path) -> None:
    """Copy the weights in ``path`` that the network has at the same names and shapes. Raises ConfigError if none of them fits."""
    own, state, copied = net.released_state_dict(), _read_init(path), 0
    with torch.no_grad():
        for name, tensor in state.items():
            for known in (name, name.removeprefix("module."), f"backbone.{name.removeprefix('module.')}"):
                if known in own and isinstance(tensor, torch.Tensor) and own[known].shape == tensor.shape:
                    own[known].copy_(tensor)
                    copied += 1
                    break
    if not copied:
        raise ConfigError(f"init {path}: none of its {len(state)} entries has the name and shape of a weight of this network")


def _read_init(path: Path) -> dict[str, Any]:
    """What is in a file of weights, by name. Raises ConfigError naming a file that is none."""
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no file of weights can fail in any way: as a pickle, a zip archive, a header of JSON
        why = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"init {path}: not a file of weights: {type(error).__name__}: {why}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ConfigError(f"init {path}: not a file of weights: expected tensors by name, got {type(state).__name__}")
    return state


def check_batches(config: TrainConfig, images: data.ImageSet | data.FolderSet, replicas: int = 1) -> None:
    """Raises ConfigError where a head of DGL, whose batch norms are over the images alone, would be given a single one.

    replicas: processes that share a batch, of which each goes through its own part in ``accumulate`` parts.
    """
    if config.loss != "dgl" or config.modules == 1 or (config.sync_batch_norm and replicas > 1):
        return
    size, count = config.batch_size, images.train_count
    for batch in {min(size, count), 0 if config.drop_last else count % size} - {0}:
        for own in {batch // replicas, -(-batch // replicas)} - {0}:
            part = -(-own // config.accumulate)  # as `Tensor.chunk` cuts
            if 1 in (part, own % part):
                raise ConfigError(
                    f"local_loss dgl: the batch norms of its heads need 2 images, and {count} in batches of {size} leave 1 alone "
                    "(other batch_size, accumulate or number of processes? drop_last?)"
                )


def load_data(config: TrainConfig) -> data.ImageSet | data.FolderSet:
    images = data.load(config.dataset, config.data_root, config.download, crop=config.crop, workers=config.workers or 0)
    if config.shrink > 1:
        images = images.shrunk(config.shrink)
    if config.hold_out > 0:
        images = images.held_out(config.hold_out)
    if images.batches(config.batch_size, config.drop_last) == 0:
        raise ConfigError(f"batch_size {config.batch_size} and drop_last: there are only {images.train_count} training images")
    return images


def build(config: TrainConfig, images: data.ImageSet | data.FolderSet) -> modules.LocalNetwork:
    if config.impl != "auto":
        # Of what has no CUDA C++ kernels, cuda asks for none (`modules.build`); Triton's are there for every op.
        for op in (op for op in ops.OPS if config.impl != "cuda" or ops.has_kernels(op, "cuda")):
            reason = ops.available(op, config.device)[config.impl]
            if reason is not None:
                raise ConfigError(f"impl {config.impl}: {op}: {reason}")
    try:
        net = modules.build(
            config.arch, config.modules, config.local_loss, config.lambdas, config.balanced, images.num_classes, images.image_size,
            images.mean, images.std, cuts=config.cuts, net_config=config.net_config, widen=config.widen, feature_dim=config.feature_dim,
            aux_depth=config.aux_depth, label_smoothing=config.label_smoothing, recompute=config.recompute, impl=config.impl,
        )  # fmt: skip
    except ImportError as error:
        raise ConfigError(str(error).removeprefix("build: ")) from error
    except ValueError as error:
        raise ConfigError(str(error).removeprefix("build: ")) from error
    return net.to(config.device, getattr(torch, config.dtype))


@contextlib.contextmanager
def machine(config: TrainConfig) -> Iterator[None]:
    """The run's thread count and kernels that repeat to the bit, and generators of its own, for as long as it lasts."""
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
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=config.tf32),
        ):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def first_network(config: TrainConfig, images: data.ImageSet | data.FolderSet) -> modules.LocalNetwork:
    """The network as every run of this config begins with it; torch's generator goes on from there."""
    torch.manual_seed(config.seed)
    net = build(config, images)
    if config.init is not None:
        load_init(net, config.init)
    return net
