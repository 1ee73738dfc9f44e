"""What a run is made of: images, network, machine and generators, from its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from infopro_fast import data, modules, named_functions, ops
from infopro_fast.errors import ConfigError, RunError
from infopro_fast.modules import split
from infopro_fast.planning import planner
from infopro_fast.planning.building import build as build_network

from . import run_folder, schedule
from .settings import fields
from .settings.config import TrainConfig

BETAS = (0.9, 0.999)  # torch's, for AdamW
INIT_SHARE = 0.9  # of the tensors of a network's blocks, which a file of weights must have


def amp_dtype(config: TrainConfig) -> torch.dtype | None:
    """Return the dtype of autocast, or None."""
    return None if config.amp == "none" else getattr(torch, config.amp)


def advice(config: TrainConfig) -> Iterator[str]:
    """Yield what makes a run slow on this machine as it is now."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if config.device == "cpu" and config.threads > 1 and load > cores + 0.5:
        busy = f"other work keeps this machine busy (load {load:.1f}, {cores} cores)"
        yield f"{busy}: --threads 1 may be several times faster than {config.threads}, whose threads wait"


def autocast(config: TrainConfig) -> contextlib.AbstractContextManager:
    """Return the context that a run's forwards run in."""
    if config.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, amp_dtype(config))


def optimizer(config: TrainConfig) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """Return `LocalTrainer`'s make_optimizer."""
    c = config
    make: Callable[[Any], torch.optim.Optimizer]
    if c.optimizer == "sgd":
        make = schedule.released_sgd(c.lr, c.momentum, c.weight_decay, c.nesterov)
    else:
        make = functools.partial(
            torch.optim.AdamW, lr=c.lr, betas=c.betas or BETAS, weight_decay=c.weight_decay, fused=True
        )
    return make if c.decay_all else lambda parameters: make(_groups(parameters))


def _groups(parameters: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Return weights, which decay, and norms and biases, which do not: the tensors of one dimension."""
    every = list(parameters)
    decayed, others = [p for p in every if p.dim() > 1], [p for p in every if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def load_init(net: modules.LocalNetwork, path: Path, partial: bool = False) -> str:
    """Copy the weights in ``path`` that fit by name and shape; return, as text, which did and which did not.

    Raises ConfigError, before anything is copied, if none fits, or, unless ``partial``, fewer than INIT_SHARE
    of the tensors of the network's blocks have one. Auxiliary nets and heads may be missing.
    """
    own, state = net.released_state_dict(), _read_init(path)
    found: dict[str, torch.Tensor] = {}
    left: list[str] = []
    for name, tensor in state.items():
        bare = name.removeprefix("module.")
        shape = tensor.shape if isinstance(tensor, torch.Tensor) else None
        fits = [n for n in (name, bare, f"backbone.{bare}") if n in own and own[n].shape == shape]
        found.update((n, tensor) for n in fits[:1])
        left += [] if fits else [name]
    if not found:
        what = f"none of its {len(state)} entries has the name and shape of a weight of this network"
        raise ConfigError(f"init {path}: {what}")

    # Files from before torch 1.0 have no counts of batches.
    needed = [name for name in net.released_block_names() if not name.endswith("num_batches_tracked")]
    share = len(found.keys() & set(needed)) / max(1, len(needed))
    counts = f"init {path}: {len(found)} of {len(own)} tensors"
    rest = f"missing: {_some([name for name in own if name not in found])}; left over: {_some(left)}"
    if share < INIT_SHARE and not partial:
        expected = f"expected {INIT_SHARE:.0%} of the tensors of the network's blocks, got {share:.0%}"
        advice = "is the file another network's? --init-partial takes it"
        raise ConfigError(f"{counts} fit; {rest}: {expected} ({advice})")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    return f"{counts} copied; {rest}"


def _some(names: list[str]) -> str:
    """Return a few of the names, and how many more there are."""
    if not names:
        return "nothing"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_init(path: Path) -> dict[str, Any]:
    """Return the contents of a file of weights, by name. Raises ConfigError naming a file of another kind."""
    try:
        if path.suffix == ".safetensors":
            state: Any = run_folder.read_tensors(path)[0]
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except RunError as error:
        raise ConfigError(f"init {error}") from error
    except Exception as error:  # another file can fail in any way: as a pickle, a zip archive, a JSON header
        why = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"init {path}: not a file of weights: {type(error).__name__}: {why}") from error
    state = modules.unwrapped(state)
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
    how: dict[str, Any] = {"crop": c.crop, "workers": c.workers or 0, "mean": c.mean, "std": c.std}
    images: Any = data.load(c.dataset, c.data_root, c.download, **how)
    if config.shrink > 1:
        images = images.shrunk(config.shrink)
    if config.hold_out > 0:
        images = images.held_out(config.hold_out)
    return images


def build(config: TrainConfig, images: data.ImageSet | data.FolderSet) -> modules.LocalNetwork:
    """Return the run's network, on its device. Raises ConfigError."""
    c = config
    if config.impl != "auto":
        # Triton has kernels for every op, CUDA C++ for some: `build` asks for no others.
        for op in (op for op in ops.OPS if config.impl != "cuda" or ops.has_kernels(op, "cuda")):
            reason = ops.available(op, config.device)[config.impl]
            if reason is not None:
                raise ConfigError(f"impl {config.impl}: {op}: {reason}")
    try:
        net = build_network(
            c.arch, c.modules, local_loss(c), c.lambdas, c.balanced, images.num_classes, images.image_size,
            images.mean, images.std, cuts=c.cuts, arch_args=fields.keywords(c.arch_args),
            net_config=c.net_config, widen=c.widen, feature_dim=c.feature_dim, aux_depth=c.aux_depth,
            label_smoothing=c.label_smoothing, pixel_reduction=c.pixel_reduction, recompute=c.recompute,
            impl=c.impl,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error).removeprefix("build: ")) from error
    net = net.to(config.device, getattr(torch, config.dtype))
    if config.compile:
        for stage in net.stages:
            stage.compile(dynamic=False)
    return net


def build_trained(
    config: TrainConfig, images: Any, run: Path, weights: dict[str, torch.Tensor]
) -> modules.LocalNetwork:
    """Return the network of a run with its weights, by the authors' names. Raises ConfigError or RunError.

    images: what `build` needs to know of them.
    """
    net = build(config, images)
    try:
        net.load_released_state_dict(weights)
    except ValueError as error:
        raise RunError(f"{run / run_folder.WEIGHTS} does not fit {run_folder.CONFIG}: {error}") from error
    return net


def cut(config: TrainConfig, images: data.ImageSet | data.FolderSet) -> TrainConfig:
    """Return the settings with the cuts that a budget or ``balanced`` asks for. Raises ConfigError.

    Published splits stay for `build` to look up.
    """
    c = config
    published = split.has_balanced(c.arch, c.image_size, c.modules)
    if c.budget is None and (not c.balanced or published):
        return c
    try:
        found = planner.plan(
            c.arch, batch_size=c.batch_size, modules=c.modules, budget=c.budget,
            image_size=images.image_size, num_classes=images.num_classes,
            arch_args=fields.keywords(c.arch_args), local_loss=local_loss(c),
            recompute="block" if c.recompute == "sqrt" else c.recompute,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    K = len(found.modules)
    lambdas = None if K == 1 else c.lambdas
    return dataclasses.replace(c, cuts=found.cuts, modules=K, lambdas=lambdas, balanced=False, budget=None)


def local_loss(config: TrainConfig) -> Any:
    """Return the name of the local loss, or a user's own function."""
    if not named_functions.is_named(config.loss):
        return config.loss
    try:
        return named_functions.find(config.loss)
    except ImportError as error:
        raise ConfigError(f"local_loss {config.loss}: {error}") from error


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


def first_network(
    config: TrainConfig, images: data.ImageSet | data.FolderSet, say: Callable[[str], None] | None = None
) -> modules.LocalNetwork:
    """Return the network that a run with these settings begins with; torch's generator goes on from there.

    say: is told what of the file ``init`` was copied.
    """
    torch.manual_seed(config.seed)
    net = build(config, images)
    if config.init is not None:
        text = load_init(net, config.init, config.init_partial)
        if say is not None:
            say(text)
    return net


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of torch's generators that a run on this device uses."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
