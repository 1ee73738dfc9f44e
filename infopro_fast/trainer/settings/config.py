"""One frozen dataclass holds every setting of a run, and the recipes are plain data. Importing this needs no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infopro_fast.errors import ConfigError, PlanError
from infopro_fast.plan import Plan


@dataclass(frozen=True)
class Recipe:
    """What to train on a data set, how long and how fast."""

    epochs: int
    batch_size: int
    lr: float
    schedule: Literal["cosine", "step", "one_cycle", "half_cosine", "poly"]
    warmup: int = 0  # epochs
    arch: str = "resnet32"
    modules: int = 4
    local_loss: str = "contrast"
    weight_decay: float = 1e-4
    nesterov: bool = True
    drop_last: bool = False
    iterations: int | None = None  # steps, in place of epochs


RECIPES = {
    # Ours, for a few minutes on two CPU cores.
    "fashion_mnist": Recipe(epochs=5, batch_size=64, lr=0.1, schedule="one_cycle", warmup=1),
    # The same on all of Fashion-MNIST.
    "fashion_mnist_full": Recipe(epochs=5, batch_size=64, lr=0.1, schedule="one_cycle", warmup=1),
    # The paper's, for every architecture and number of modules (README of the released code).
    "cifar10": Recipe(epochs=160, batch_size=1024, lr=0.8, schedule="cosine", warmup=10),
    "svhn": Recipe(epochs=160, batch_size=1024, lr=0.8, schedule="cosine", warmup=10),
    "stl10": Recipe(epochs=160, batch_size=128, lr=0.1, schedule="cosine", warmup=10),
    "imagenet": Recipe(epochs=90, batch_size=1024, lr=0.4, schedule="half_cosine", arch="resnet101", modules=2, local_loss="softmax"),
    "cityscapes": Recipe(
        epochs=108, batch_size=8, lr=0.01, schedule="poly", arch="deeplabv3_resnet101", modules=2, local_loss="softmax", weight_decay=5e-4,
        nesterov=False, drop_last=True, iterations=40000,
    ),
    # Ours, as the first.
    "shapes_seg": Recipe(
        epochs=12, batch_size=32, lr=0.1, schedule="one_cycle", warmup=2, arch="fcn_resnet20", modules=2, local_loss="softmax"
    ),
}  # fmt: skip

# Published weights of ResNet-110, contrast, on SVHN, by number of modules. Those of CIFAR-10 and STL-10 are `build`'s defaults.
SVHN_LAMBDAS = {
    2: (1.0, 0.1, 0.0, 0.0),
    4: (5.0, 0.0, 0.5, 1.0),
    8: (5.0, 0.0, 0.5, 2.0),
    16: (5.0, 0.2, 0.5, 1.0),
}

IMAGE_SIZES: dict[str, int | tuple[int, int]] = {
    "fashion_mnist": 32, "fashion_mnist_full": 32, "cifar10": 32, "svhn": 32, "stl10": 96, "imagenet": 224, "cityscapes": (512, 1024),
    "shapes_seg": 48,
}  # fmt: skip
WARM = ("cosine", "one_cycle")  # schedules with a warm-up
EMBEDDED = ("fashion_mnist", "shapes_seg")
FOLDERS = ("imagenet", "cityscapes")  # image files that are read as they are needed, in crops
SEGMENTATION = ("shapes_seg", "cityscapes")
Arch = Literal[
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "densenet_bc_100_12",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet20",
]  # fmt: skip
ARCHS = typing.get_args(Arch)
CIFAR_RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
WEIGHTED = ("contrast", "softmax", "infopro_l")  # local losses of a reconstruction and a task, which lambdas weigh
SEGMENTERS = ("deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet20")


Dataset = Literal["fashion_mnist", "fashion_mnist_full", "shapes_seg", "cifar10", "svhn", "stl10", "imagenet", "cityscapes"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a network in local modules and write a run folder."""

    dataset: Dataset = "fashion_mnist"
    """Images to learn; fashion_mnist, a part of Fashion-MNIST, and shapes_seg, segmentation of scenes made of it, come with the package."""
    data_root: Path | None = None
    """Folder with the original files of the other data sets, as torchvision keeps them."""
    download: bool = False
    """Fetch files that are missing into data_root."""

    crop: tuple[int, int] | None = None
    """Height and width of the crops of imagenet and cityscapes. Default: 224 224 and 512 1024."""
    shrink: int = 1
    """Average the images over squares of this side, to train in less time; not of imagenet, cityscapes and shapes_seg."""
    hold_out: int = 0
    """Training images (the last ones) that are left out and tested on instead of the test images, to choose settings by."""
    workers: int | None = None
    """Processes that read the images of imagenet and cityscapes. Default: one a CPU, 8 at most."""

    arch: Arch | None = None
    """Network. Default: resnet32; for imagenet resnet101, for cityscapes deeplabv3_resnet101, for shapes_seg fcn_resnet20."""
    init: Path | None = None
    """Weights to begin with: a .pth or .safetensors file by released names, e.g. pretrained; heads of other shapes are left out."""
    modules: int | None = None
    """Number K of local modules; 1 is end to end. Default: from cuts, 1 for local_loss none, 2 for the larger data sets, else 4."""
    local_loss: Literal["contrast", "softmax", "greedy", "dgl", "infopro_l", "auglocal", "none"] | None = None
    """What trains a local module: InfoPro, contrastive or (larger sets) softmax; greedy SL, DGL, in the manner of InfoProL, AugLocal."""
    lambdas: tuple[float, float, float, float] | None = None
    """InfoPro's weights (reconstruction, task) of the first local module, then of the last. Default: the published ones."""
    balanced: bool = False
    """Split by memory (InfoPro*) rather than by depth."""
    cuts: tuple[tuple[int, int], ...] | None = None
    """Last unit (stage block) of each module but the last, instead of a published split."""
    plan: Path | None = None
    """File that `infopro-fast plan` wrote: its arch, cuts, recompute and, unless one is given, batch size."""
    net_config: Literal["0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f"] | None = None
    """Layers of the auxiliary classifier. Default: 1c2f, for greedy 0c1f."""
    widen: float = 1.0
    """Width of the auxiliary nets."""
    feature_dim: int = 128
    """Width of the auxiliary classifier's hidden layer and of the contrastive features."""
    aux_depth: int | None = None
    """Blocks of the first module's auxiliary network of auglocal; later modules have fewer. Default: 3."""
    recompute: Literal["none", "norm", "block", "sqrt"] = "none"
    """Make again in backward: what norms give convolutions, each residual block, or sqrt(blocks) of them at once."""

    epochs: int | None = None
    """Passes over the training images. Default, like the settings down to nesterov: the recipe of the data set."""
    iterations: int | None = None
    """Steps in place of epochs; the last epoch may then be shorter."""
    batch_size: int | None = None
    """Images per step."""
    lr: float | None = None
    """Highest learning rate."""
    schedule: Literal["cosine", "step", "one_cycle", "half_cosine", "poly"] | None = None
    """Learning rate: cosine, step, half_cosine (ImageNet) by the epoch and poly (Cityscapes) as released; one_cycle: linear up and down."""
    warmup: int | None = None
    """Epochs of warm-up."""
    zero_last_epoch: bool = True
    """Let the cosine reach 0 in the last epoch, as released."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float | None = None
    """L2 penalty on every parameter."""
    nesterov: bool = True
    """Nesterov's momentum rather than the plain one; the recipe of cityscapes has the plain one."""
    drop_last: bool = False
    """Leave out a last, smaller batch; the recipe of cityscapes does."""
    accumulate: int = 1
    """Parts to go through each batch in, their gradients added up; batch norms and contrastive losses see a part alone."""
    label_smoothing: float = 0.0
    """Of every cross entropy."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, taken every step, which is what is tested and written."""
    augment: bool = True
    """Crop and flip at random."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights and arithmetic."""
    amp: Literal["none", "bfloat16", "float16"] = "none"
    """Run forwards under autocast to this dtype; weights stay in dtype. float16 scales each module's loss."""
    tf32: bool = False
    """On a GPU, let float32 convolutions and products round their factors to TF32."""
    cuda_graph: bool = False
    """On a GPU, capture the whole step in a CUDA graph once it has run three times."""
    resident: bool = True
    """Keep all images on the device, as uint8; otherwise batches are made on the CPU and copied ahead of their use."""
    impl: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Implementation of the losses. cuda: CUDA C++ kernels of the reconstruction, which alone has some; the others as with auto."""
    threads: int | None = None
    """CPU threads. Default: torch's."""

    order: Literal["simultaneous", "sequential"] = "simultaneous"
    """Train all modules on every batch, or each to its end before the next (the paper's Asy-InfoPro), one in memory at a time."""
    cache: bool = True
    """With order sequential: keep the outputs of the trained modules on the disk; otherwise these run again for every batch."""
    cached_epochs: int | None = None
    """With order sequential: epochs whose augmented images are cached, used in turn. Default: all, which changes nothing."""

    parallel: Literal["none", "data", "pipeline"] = "none"
    """Train in the processes that torchrun starts: each takes a part of every batch (data), or some of the modules (pipeline)."""
    sync_batch_norm: bool = False
    """With parallel data: batch norms over the images of all processes."""
    global_contrast: bool = False
    """With parallel data: contrast an image with those of all processes."""
    pipeline_modules: tuple[int, ...] | None = None
    """With parallel pipeline: how many modules each process trains, from the first; several times as many processes share the batch."""
    wire: Literal["exact", "bfloat16"] = "exact"
    """With parallel pipeline: how features go from one process to the next; rounding halves the bytes."""
    in_flight: int = 2
    """With parallel pipeline: batches that may be on their way between two processes."""
    patience: float | None = None
    """Seconds without progress, by single images and pieces of files, after which a run stops. Default: 20 for several processes."""

    recipe: str | None = None
    """Row of the paper's tables (`infopro-fast recipes`) whose settings these are, but for those given; of one process, so of several."""
    out: Path | None = None
    """Run folder to create. Default: runs/ and a name made of the settings and the time."""
    checkpoint_minutes: float = 10.0
    """Write a checkpoint this often, besides one after every epoch."""
    log_every: int = 20
    """Steps between two readings of the losses, which are when a non-finite one is found."""

    def __post_init__(self):
        for name in ("data_root", "out", "plan", "init"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if self.plan is not None:
            _take_plan(self)
        for name in ("lambdas", "cuts", "crop", "pipeline_modules"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value))
        _check_choices(self)
        _check_numbers(self)
        _check_contradictions(self)
        _check_parallel(self)
        _check_order(self)

    def resolved(self) -> TrainConfig:
        """The same settings with every default of data set, network and machine written out, and data_root from the root of the disk.

        Of a run counted in iterations, `in_epochs` finds the epochs, and the warm-up where it was not given and the schedule has one.
        """
        import torch

        from infopro_fast.modules.auglocal import AUX_DEPTH
        from infopro_fast.modules.local_loss import default_lambdas

        recipe, modules, arch, local_loss = RECIPES[self.dataset], self.number_of_modules(), self.network, self.loss
        lambdas = self.lambdas
        if lambdas is None and local_loss in WEIGHTED and modules > 1:
            svhn = self.dataset == "svhn" and (arch, local_loss, self.balanced) == ("resnet110", "contrast", False)
            if svhn and self.cuts is None and modules in SVHN_LAMBDAS:
                lambdas = SVHN_LAMBDAS[modules]
            else:
                name = arch if self.cuts is None else ""
                lambdas = default_lambdas(name, modules, local_loss, balanced=self.balanced, image_size=self.image_size[0])
        of_recipe = ("epochs", "batch_size", "lr", "schedule", "warmup", "weight_decay", "iterations")
        given = {name: getattr(self, name) for name in of_recipe}
        written = {name: getattr(recipe, name) if value is None else value for name, value in given.items()}
        if self.epochs is not None:
            written["iterations"] = self.iterations
        written |= {"nesterov": self.nesterov and recipe.nesterov, "drop_last": self.drop_last or recipe.drop_last}
        crop, workers = self.crop, self.workers
        if self.dataset in FOLDERS:
            crop, workers = self.image_size, min(8, os.cpu_count() or 1) if workers is None else workers
        if self.warmup is None:
            later = written["iterations"] is not None and written["schedule"] in WARM
            written["warmup"] = None if later else _default_warmup(recipe, written["schedule"], written["epochs"])
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        _check_device(self, device)
        threads = torch.get_num_threads() if self.threads is None else self.threads
        # So that the run finds its images from any folder that it is continued or tested in.
        data_root = None if self.data_root is None else self.data_root.absolute()
        return dataclasses.replace(
            self, data_root=data_root, arch=arch, local_loss=local_loss, modules=modules, lambdas=lambdas, crop=crop, workers=workers,
            device=device, threads=threads, **written,
            aux_depth=self.aux_depth or (AUX_DEPTH if local_loss == "auglocal" and modules > 1 else None),
        )  # fmt: skip

    def in_epochs(self, batches: int) -> TrainConfig:
        """This resolved config with its iterations as epochs of ``batches`` steps each, of which the last may be cut short.

        Raises ConfigError if a warm-up that was given is as long.
        """
        if self.iterations is None:
            return self
        epochs = math.ceil(self.iterations / batches)
        warmup = _default_warmup(RECIPES[self.dataset], self.schedule, epochs) if self.warmup is None else self.warmup
        if self.schedule in WARM and warmup >= epochs:
            raise ConfigError(f"warmup {warmup}: expected fewer than the {epochs} epochs of {self.iterations} iterations")
        return dataclasses.replace(self, epochs=epochs, warmup=warmup)

    def to_look_at(
        self, *, device: str | None = None, data_root: str | Path | None = None, threads: int | None = None
    ) -> TrainConfig:  # fmt: skip
        """The settings to evaluate a run with that was trained with these. device, data_root, threads: if not those of the run.

        Nothing is downloaded. On another kind of device what only the run's own has is left out, kernels that were named, too.
        """
        device, changes = device or self.device, {}
        if device.partition(":")[0] != self.device.partition(":")[0]:
            changes = {"tf32": False, "cuda_graph": False, "impl": "reference" if self.impl == "reference" else "auto"}
        data_root, threads = data_root or self.data_root, threads or self.threads
        return dataclasses.replace(self, device=device, data_root=data_root, threads=threads, download=False, **changes)

    @property
    def network(self) -> str:
        return self.arch or RECIPES[self.dataset].arch

    @property
    def loss(self) -> str:
        return self.local_loss or RECIPES[self.dataset].local_loss

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.crop or IMAGE_SIZES[self.dataset]
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.shrink, width // self.shrink

    def number_of_modules(self) -> int:
        if self.modules is not None:
            return self.modules
        return len(self.cuts) + 1 if self.cuts is not None else 1 if self.local_loss == "none" else RECIPES[self.dataset].modules

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @staticmethod
    def from_json(text: str) -> TrainConfig:
        """Raises ConfigError if this is not what `to_json` wrote."""
        try:
            content = json.loads(text)
            state = content.pop("optimizer_state", "float32") if isinstance(content, dict) else "float32"
            if state != "float32":  # a setting of earlier versions
                raise ConfigError(f"optimizer_state: expected float32, the only one that runs have, got {state}")
            return TrainConfig(**content)
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"not the settings of a run: {error}") from error


def _take_plan(c: TrainConfig) -> None:
    """Write what the plan says in the place of what was not given. A run's settings then have that, and the file is not needed again."""
    try:
        plan = Plan.read(c.plan)
    except PlanError as error:
        raise ConfigError(f"plan: {error}") from error
    size = c.image_size if c.dataset in IMAGE_SIZES else None
    if plan.image_size != size:
        raise ConfigError(f"plan {c.plan} is for images of {plan.image_size}, dataset {c.dataset} has {size}")
    defaults = {field.name: field.default for field in dataclasses.fields(c)}
    for name in ("arch", "cuts", "recompute", "batch_size"):
        given, planned = getattr(c, name), getattr(plan, name)
        if given == defaults[name]:
            object.__setattr__(c, name, planned)
        elif given != planned and name != "batch_size":
            raise ConfigError(f"plan {c.plan} has {name} {planned}, not {given}")
    object.__setattr__(c, "plan", None)


def _default_warmup(recipe: Recipe, schedule: str, epochs: int) -> int:
    """The recipe's epochs of warm-up, as far as a shorter run has room for them, of the schedules that have one."""
    return min(recipe.warmup, epochs - 1) if schedule in WARM else 0


def _fail(name: str, expected: str, got) -> None:
    raise ConfigError(f"{name}: expected {expected}, got {got}")


def _check_choices(c: TrainConfig) -> None:
    for name, hint in (
        ("dataset", tuple(RECIPES)),
        ("arch", (None, *ARCHS)),
        ("local_loss", (None, "contrast", "softmax", "greedy", "dgl", "infopro_l", "auglocal", "none")),
        ("net_config", (None, "0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f")),
        ("recompute", ("none", "norm", "block", "sqrt")),
        ("schedule", (None, "cosine", "step", "one_cycle", "half_cosine", "poly")),
        ("dtype", ("float32", "float64")),
        ("amp", ("none", "bfloat16", "float16")),
        ("order", ("simultaneous", "sequential")),
        ("parallel", ("none", "data", "pipeline")),
        ("wire", ("exact", "bfloat16")),
        ("impl", ("auto", "reference", "cpu", "triton", "cuda")),
    ):
        if getattr(c, name) not in hint:
            _fail(name, f"one of {hint}", repr(getattr(c, name)))


def _check_numbers(c: TrainConfig) -> None:
    for name in (
        "modules", "epochs", "iterations", "batch_size", "accumulate", "warmup", "workers", "threads", "log_every", "feature_dim",
        "aux_depth", "in_flight", "cached_epochs", "shrink", "hold_out",
    ):  # fmt: skip
        value, least = getattr(c, name), 0 if name in ("warmup", "workers", "hold_out") else 1
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            _fail(name, f"an integer of at least {least}", repr(value))
    if not isinstance(c.seed, int) or isinstance(c.seed, bool) or not 0 <= c.seed < 2**63:
        _fail("seed", "an integer of at least 0 and below 2^63", repr(c.seed))
    for name in ("lr", "checkpoint_minutes", "widen", "patience"):
        value = getattr(c, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            _fail(name, "a positive number", repr(value))
    if not 0 <= c.momentum < 1:
        _fail("momentum", "a number in [0, 1)", c.momentum)
    if c.weight_decay is not None and not (c.weight_decay >= 0 and math.isfinite(c.weight_decay)):
        _fail("weight_decay", "a number of at least 0", c.weight_decay)
    for name in ("label_smoothing", "ema"):
        value = getattr(c, name)
        if value is not None and not 0 <= value < 1:
            _fail(name, "a number in [0, 1)", value)
    if c.crop is not None and (len(c.crop) != 2 or min(c.crop) < 32):
        _fail("crop", "height and width of at least 32", c.crop)
    if c.lambdas is not None and (len(c.lambdas) != 4 or not all(math.isfinite(v) and v >= 0 for v in c.lambdas)):
        _fail("lambdas", "4 numbers of at least 0 (reconstruction and task, first and last)", c.lambdas)
    if c.cuts is not None and any(len(cut) != 2 for cut in c.cuts):
        _fail("cuts", "pairs of stage and block", c.cuts)


def _check_device(c: TrainConfig, device: str) -> None:
    for name in ("tf32", "cuda_graph"):
        if getattr(c, name) and device == "cpu":
            raise ConfigError(f"{name} and device {device}: only a GPU has it")


def _check_order(c: TrainConfig) -> None:
    if c.order == "simultaneous":
        for name, default in (("cache", True), ("cached_epochs", None)):
            if getattr(c, name) != default:
                raise ConfigError(f"{name}: expected order sequential, got order simultaneous")
        return
    if c.parallel != "none":
        raise ConfigError(f"order sequential and parallel {c.parallel}: one module is trained after the other")
    if c.number_of_modules() == 1:
        raise ConfigError("order sequential: modules 1 has nothing to train in turn")
    if not c.cache and c.cached_epochs is not None:
        raise ConfigError("cached_epochs and no-cache: nothing is cached")
    for name, default in (("cuda_graph", False), ("ema", None)):
        if getattr(c, name) != default:
            raise ConfigError(f"order sequential and {name}: not supported")


def _check_parallel(c: TrainConfig) -> None:
    of_pipeline = {"pipeline_modules": None, "wire": "exact", "in_flight": 2}
    of_processes = {"sync_batch_norm": False, "global_contrast": False}
    for name, default in of_pipeline.items():
        if c.parallel != "pipeline" and getattr(c, name) != default:
            raise ConfigError(f"{name}: expected parallel pipeline, got parallel {c.parallel}")
    for name, default in of_processes.items():
        if c.parallel == "none" and getattr(c, name) != default:
            raise ConfigError(f"{name}: expected parallel data or pipeline, got parallel none")
    if c.sync_batch_norm and c.recompute == "norm":
        raise ConfigError(
            "sync_batch_norm and recompute norm: expected recompute none, block or sqrt, whose norms ask other processes once"
        )
    if c.parallel != "none" and c.cuda_graph:
        raise ConfigError(f"parallel {c.parallel} and cuda_graph: steps that talk to other processes are not captured")
    if c.pipeline_modules is not None and (
        any(not isinstance(n, int) or n < 1 for n in c.pipeline_modules) or sum(c.pipeline_modules) != c.number_of_modules()
    ):
        _fail("pipeline_modules", f"numbers of at least 1 whose sum is the {c.number_of_modules()} modules", c.pipeline_modules)
    if c.global_contrast and c.loss != "contrast":
        raise ConfigError(f"global_contrast: local_loss {c.loss} contrasts nothing")
    if c.global_contrast and c.accumulate > 1:
        raise ConfigError("global_contrast and accumulate: the images of all processes are contrasted at once")


def _check_contradictions(c: TrainConfig) -> None:
    modules, local_loss, arch = c.number_of_modules(), c.loss, c.network
    if c.dataset in EMBEDDED and (c.data_root is not None or c.download):
        raise ConfigError(f"dataset {c.dataset} comes with the package: it takes neither data_root nor download")
    if c.dataset in FOLDERS and c.download:
        raise ConfigError(f"download: the files of {c.dataset} cannot be fetched without an account")
    if c.dataset not in EMBEDDED and c.data_root is None:
        raise ConfigError(f"dataset {c.dataset} needs data_root, the folder with its original files" + (" to fetch" if c.download else ""))
    if local_loss == "none" and modules != 1:
        raise ConfigError(f"local_loss none trains end to end: expected modules 1, got {modules}")
    if c.cuts is not None and c.balanced:
        raise ConfigError("cuts and balanced: a split is either given or taken from the balanced table")
    if c.cuts is not None and len(c.cuts) != modules - 1:
        raise ConfigError(f"modules {modules} and cuts: expected {modules - 1} cuts, got {len(c.cuts)}")
    if c.lambdas is not None and not (local_loss in WEIGHTED and modules > 1):
        raise ConfigError(f"lambdas: local_loss {local_loss} with modules {modules} has nothing to weigh")
    if c.net_config is not None and local_loss in ("dgl", "auglocal", "none"):
        raise ConfigError(f"net_config: local_loss {local_loss} has no such head")
    if modules == 1 and c.balanced:
        raise ConfigError("balanced: modules 1 has nothing to split")
    segments = c.dataset in SEGMENTATION
    if segments != (arch in SEGMENTERS):
        expected = SEGMENTERS if segments else "a network that classifies"
        raise ConfigError(f"arch {arch} and dataset {c.dataset}: expected {expected}")
    if segments and local_loss in ("contrast", "dgl", "infopro_l", "auglocal"):
        raise ConfigError(f"local_loss {local_loss}: dataset {c.dataset} is segmented: expected softmax, greedy or none")
    for name in ("crop", "workers"):
        if getattr(c, name) is not None and c.dataset not in FOLDERS:
            raise ConfigError(f"{name}: the images of {c.dataset} are in memory as they are")
    for name, default in (("shrink", 1), ("hold_out", 0)):
        if getattr(c, name) != default and (c.dataset in FOLDERS or c.dataset in SEGMENTATION):
            raise ConfigError(f"{name}: not of dataset {c.dataset}")
    if IMAGE_SIZES[c.dataset] in (32, 96) and (IMAGE_SIZES[c.dataset] % c.shrink or IMAGE_SIZES[c.dataset] // c.shrink < 8):
        _fail("shrink", f"a divisor of {IMAGE_SIZES[c.dataset]} that leaves at least 8 pixels", c.shrink)
    if local_loss == "auglocal" and arch not in CIFAR_RESNETS:
        raise ConfigError(f"local_loss auglocal takes its blocks from a CIFAR ResNet: expected arch {', '.join(CIFAR_RESNETS)}, got {arch}")
    if c.aux_depth is not None and (local_loss != "auglocal" or modules == 1):
        raise ConfigError(f"aux_depth: local_loss {local_loss} with modules {modules} has no such net")
    plain = local_loss in ("dgl", "auglocal", "none") or modules == 1  # no auxiliary nets that these settings are of
    for name, default in (("net_config", None), ("widen", 1.0), ("feature_dim", 128)):
        if plain and getattr(c, name) != default:
            raise ConfigError(f"{name}: local_loss {local_loss} with modules {modules} has no such net")
    if c.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        _fail("device", "auto, cpu, cuda or cuda:N", repr(c.device))
    if c.amp != "none" and c.dtype == "float64":
        raise ConfigError(f"amp {c.amp} and dtype float64: autocast is of float32")
    if c.amp == "float16" and c.cuda_graph:
        raise ConfigError("amp float16 and cuda_graph: its gradient scaler is not captured; use bfloat16")
    if c.device != "auto":
        _check_device(c, c.device)
    if c.impl == "cpu" and c.device not in ("auto", "cpu"):
        raise ConfigError(f"impl cpu and device {c.device}: the CPU kernels run on the CPU")
    if c.impl in ("triton", "cuda") and c.device == "cpu":
        raise ConfigError(f"impl {c.impl} and device cpu: these kernels run on a GPU")
    recipe = RECIPES[c.dataset]
    schedule = c.schedule or recipe.schedule
    epochs = c.epochs or recipe.epochs
    warmup = _default_warmup(recipe, schedule, epochs) if c.warmup is None else c.warmup
    if schedule != "cosine" and not c.zero_last_epoch:
        raise ConfigError(f"zero_last_epoch: schedule {schedule} has no such epoch")
    if schedule not in WARM and c.warmup:
        raise ConfigError(f"schedule {schedule} has no warm-up, got warmup {c.warmup}")
    if schedule in WARM and warmup >= epochs and c.iterations is None:  # else `in_epochs` knows how many there are
        raise ConfigError(f"warmup {warmup}: expected fewer than the {epochs} epochs")
