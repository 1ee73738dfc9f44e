"""`TrainConfig`: every setting of a run, in one frozen dataclass.

An annotation says which values a setting may have and what a change of it changes (`fields`); `rules` says
which settings exclude each other. Importing this needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from infopro_fast.errors import ConfigError, PlanError
from infopro_fast.plan_file import Plan
from infopro_fast.published import AUX_DEPTH, WEIGHTED, default_lambdas

from . import fields, machine, rules
from .data_sets import (
    FOLDERS,
    IMAGE_SIZES,
    MEASURED,
    OWN,
    RECIPES,
    WARM,
    Arch,
    Dataset,
    Recipe,
    Schedule,
    kind,
)
from .fields import (
    BITS,
    FRACTION,
    MACHINE,
    NOT_NEGATIVE,
    NOTHING,
    POSITIVE,
    RESULT,
    SAID,
    Limit,
    at_least,
    one_of,
)

LocalLoss = Literal["contrast", "softmax", "greedy", "dgl", "infopro_l", "auglocal", "none"]

DATASET = one_of(Dataset, OWN)
ARCH = one_of(Arch, f"torchvision:NAME, timm:NAME or {OWN}")
LOSS = one_of(LocalLoss, OWN)
SEED = Limit("an integer of at least 0 and below 2^63", lambda seed: 0 <= seed < 2**63)
CROP = Limit("height and width of at least 32", lambda size: min(size) >= 32)
LAMBDAS = Limit(
    "4 numbers of at least 0 (reconstruction and task, first and last)", lambda weights: min(weights) >= 0
)
MEAN = Limit("three numbers", lambda values: True)
STD = Limit("three positive numbers", lambda values: min(values) > 0)
BETAS = Limit("two numbers in [0, 1)", lambda betas: 0 <= min(betas) and max(betas) < 1)
WORDS = Limit("words like name=value", lambda words: all("=" in word for word in words))
CUTS = Limit("pairs of stage and block", lambda cuts: True)
SPANS = Limit("numbers of at least 1", lambda counts: len(counts) > 0 and min(counts) >= 1)
DEVICE = Limit("auto, cpu, cuda or cuda:N", lambda name: name.partition(":")[0] in ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class TrainConfig:
    """Train a network in local modules and write a run folder."""

    dataset: Annotated[str, DATASET, RESULT] = "fashion_mnist"
    """Images to learn.
    fashion_mnist, a part of Fashion-MNIST, and shapes_seg, scenes to segment, come with the package.
    imagefolder: your own, in folders data_root/train/CLASS and data_root/val/CLASS.
    fashion_mnist_full, cifar10, svhn, stl10, imagenet, cityscapes: the original files, in data_root.
    package.module:function: called with train=True, then False, it returns a torch Dataset of (image, label).
    torchvision.datasets:CIFAR100 is one."""
    data_root: Annotated[Path | None, SAID, NOTHING] = None
    """Folder with the files of the data set, laid out as torchvision does."""
    download: Annotated[bool, NOTHING] = False
    """Download missing files into data_root."""

    crop: Annotated[tuple[int, int] | None, CROP, SAID, RESULT] = None
    """Height and width of the crops of imagenet, imagefolder and cityscapes.
    Default: 224 224, for cityscapes 512 1024. Images of package.module:function are scaled to it.
    Their default: 32 32."""
    mean: Annotated[tuple[float, float, float] | None, MEAN, SAID, RESULT] = None
    """Mean of each channel of images in [0, 1]. Default: the data set's; your own images are measured."""
    std: Annotated[tuple[float, float, float] | None, STD, SAID, RESULT] = None
    """Standard deviation of each channel, to go with mean."""
    shrink: Annotated[int, at_least(1), RESULT] = 1
    """Average the images over squares of this side, to train faster.
    Not for imagenet, cityscapes and shapes_seg."""
    hold_out: Annotated[int, at_least(0), RESULT] = 0
    """Leave out this many training images, the last ones, and test on them instead of the test images.
    Use it to choose settings."""
    workers: Annotated[int | None, at_least(0), SAID, MACHINE] = None
    """Processes that read image files. Default: one for each CPU, at most 8."""

    arch: Annotated[str | None, ARCH, SAID, RESULT] = None
    """Network: resnet20, 32, 44, 56 or 110, densenet_bc_100_12; torchvision's resnet18 to resnet152,
    resnext50_32x4d, resnext101_32x8d; deeplabv3_resnet50 or 101, fcn_resnet20, which segment.
    torchvision:NAME, timm:NAME or package.module:function: a classifier that other code makes.
    Default: resnet32; imagefolder: resnet18; imagenet: resnet101; cityscapes: deeplabv3_resnet101;
    shapes_seg: fcn_resnet20."""
    arch_args: Annotated[tuple[str, ...] | None, WORDS, SAID, RESULT] = None
    """Arguments of the function that makes a network with a colon in its name, such as drop_rate=0.1."""
    init: Annotated[Path | None, SAID, RESULT] = None
    """Begin with the weights in this .pth or .safetensors file, which has the names of the authors' code.
    What fits by name and shape is copied; heads and auxiliary nets may be missing."""
    init_partial: Annotated[bool, NOTHING] = False
    """Take a file of init that has less than 90 % of the tensors of the network's blocks, too."""
    modules: Annotated[int | None, at_least(1), SAID, RESULT] = None
    """Number K of local modules; 1 trains end to end.
    Default: as cuts says; 1 for local_loss none; 2 for imagenet, cityscapes and shapes_seg; else 4."""
    local_loss: Annotated[str | None, LOSS, SAID, RESULT] = None
    """Loss of a local module.
    contrast: InfoPro with a contrastive loss; softmax: InfoPro with a classifier; greedy: greedy SL.
    dgl, infopro_l, auglocal: DGL, InfoProL and AugLocal; none: end-to-end training.
    package.module:function: your own; called with a Place, it returns a LocalLoss (docs/local_losses.md).
    Default: softmax for imagenet, imagefolder, cityscapes and shapes_seg, else contrast."""
    lambdas: Annotated[tuple[float, float, float, float] | None, LAMBDAS, SAID, RESULT] = None
    """InfoPro's weights: reconstruction and task of the first local module, then of the last.
    Default: the published ones."""
    balanced: Annotated[bool, RESULT] = False
    """Split the network by memory instead of by depth: as published (InfoPro*), or as planned."""
    budget: Annotated[str | None, SAID, RESULT] = None
    """Split the network into as few modules as fit into this many bytes, such as 4GiB, with everything:
    parameters, momentum, batch, gradients and the peak of a step."""
    cuts: Annotated[tuple[tuple[int, int], ...] | None, CUTS, SAID, RESULT] = None
    """Last block of each module but the last, as pairs of stage and block. Default: the published split."""
    plan: Annotated[Path | None, SAID, RESULT] = None
    """Take arch, cuts and recompute from this file, which `infopro-fast plan` wrote.
    The batch size, too, unless one is given."""
    net_config: Annotated[Literal["0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f"] | None, SAID, RESULT] = None
    """Convolutions (c) and linear layers (f) of the auxiliary classifier. Default: 1c2f; greedy: 0c1f."""
    widen: Annotated[float, POSITIVE, RESULT] = 1.0
    """Multiply the width of the auxiliary networks by this."""
    feature_dim: Annotated[int, at_least(1), RESULT] = 128
    """Width of the auxiliary classifier's hidden layer and of the contrastive features."""
    aux_depth: Annotated[int | None, at_least(1), SAID, RESULT] = None
    """Blocks of AugLocal's first auxiliary network; later modules have shorter ones. Default: 3."""
    recompute: Annotated[Literal["none", "norm", "block", "sqrt"], BITS] = "none"
    """Recompute in backward, to save memory.
    norm: each convolution's normalised input.
    block: each residual block.
    sqrt: segments of sqrt(blocks) blocks."""

    epochs: Annotated[int | None, at_least(1), SAID, RESULT] = None
    """Passes over the training images. Default, as for all settings down to weight_decay: the data set's.
    With --resume, a larger number trains longer.
    The schedule then goes over all epochs, so that the learning rate of the remaining ones goes up."""
    iterations: Annotated[int | None, at_least(1), SAID, RESULT] = None
    """Train for this many steps instead of epochs. The last epoch may then be shorter."""
    batch_size: Annotated[int | None, at_least(1), SAID, RESULT] = None
    """Images in a step."""
    lr: Annotated[float | None, POSITIVE, SAID, RESULT] = None
    """Highest learning rate."""
    schedule: Annotated[Schedule | None, SAID, RESULT] = None
    """Learning rate over time.
    cosine, step, half_cosine (ImageNet), poly (Cityscapes): the authors'. one_cycle: up, then down."""
    warmup: Annotated[int | None, at_least(0), SAID, RESULT] = None
    """Epochs of warm-up, for schedules cosine and one_cycle."""
    zero_last_epoch: Annotated[bool, RESULT] = True
    """Let the cosine reach 0 in the last epoch, as the authors' code does."""
    momentum: Annotated[float, FRACTION, RESULT] = 0.9
    """Momentum of SGD."""
    optimizer: Annotated[Literal["sgd", "adamw"], RESULT] = "sgd"
    """Optimizer of each module. adamw decouples weight_decay from the gradient."""
    betas: Annotated[tuple[float, float] | None, BETAS, SAID, RESULT] = None
    """Decay of adamw's averages of the gradient and of its square. Default: 0.9 0.999."""
    weight_decay: Annotated[float | None, NOT_NEGATIVE, SAID, RESULT] = None
    """L2 penalty on every parameter."""
    decay_all: Annotated[bool, RESULT] = True
    """Apply weight_decay to all parameters, as the authors do. Otherwise not to norms and biases."""
    clip_grad: Annotated[float | None, POSITIVE, SAID, RESULT] = None
    """Scale each module's gradients down to this norm where theirs is larger."""
    nesterov: Annotated[bool, RESULT] = True
    """Use Nesterov's momentum. The recipe of cityscapes never does."""
    drop_last: Annotated[bool, RESULT] = False
    """Leave out a last, smaller batch. The recipe of cityscapes always does."""
    accumulate: Annotated[int, at_least(1), RESULT] = 1
    """Go through each batch in this many parts and add up their gradients.
    Batch norms and contrastive losses see one part at a time."""
    label_smoothing: Annotated[float, FRACTION, RESULT] = 0.0
    """Label smoothing of every cross entropy."""
    pixel_reduction: Annotated[Literal["mean", "mean_all"], RESULT] = "mean"
    """Average the losses of DeepLab's own heads over labelled pixels, or over all as the authors do."""
    ema: Annotated[float | None, FRACTION, SAID, RESULT] = None
    """Test and write an exponential moving average of the weights with this decay, updated in every step."""
    augment: Annotated[bool, RESULT] = True
    """Crop and flip the training images at random."""
    mixup: Annotated[float | None, POSITIVE, SAID, RESULT] = None
    """Mix pairs of training images and their labels (MixUp), in shares of a Beta distribution of this alpha.
    Needs torchvision. With cutmix, too, each batch takes one of the two."""
    cutmix: Annotated[float | None, POSITIVE, SAID, RESULT] = None
    """Paste a rectangle of a training image into another (CutMix), in shares of a Beta distribution of this
    alpha, and mix their labels."""
    seed: Annotated[int, SEED, RESULT] = 0
    """Seed of initial weights, image order and augmentation."""

    device: Annotated[str, DEVICE, BITS] = "auto"
    """cpu, cuda or cuda:N; auto is cuda where there is a GPU."""
    dtype: Annotated[Literal["float32", "float64"], RESULT] = "float32"
    """Type of weights and arithmetic."""
    amp: Annotated[Literal["none", "bfloat16", "float16"], RESULT] = "none"
    """Run the forward pass under autocast to this type; weights keep dtype.
    float16 scales each module's loss."""
    tf32: Annotated[bool, RESULT] = False
    """On a GPU, let float32 convolutions and matrix products round their inputs to TF32."""
    compile: Annotated[bool, BITS] = False
    """Compile the layers of each module with torch.compile. The first steps take minutes."""
    cuda_graph: Annotated[bool, BITS] = False
    """On a GPU, capture the whole step in a CUDA graph after it has run three times."""
    resident: Annotated[bool, BITS] = True
    """Keep all images on the device, as uint8.
    Otherwise the CPU makes batches and copies them ahead of their use."""
    impl: Annotated[Literal["auto", "reference", "cpu", "triton", "cuda"], BITS] = "auto"
    """Implementation of the losses.
    cuda: CUDA C++ kernels for the reconstruction loss, and auto for the others, which have none."""
    threads: Annotated[int | None, at_least(1), SAID, MACHINE] = None
    """CPU threads. Default: torch's number."""

    order: Annotated[Literal["simultaneous", "sequential"], RESULT] = "simultaneous"
    """simultaneous: train all modules on every batch.
    sequential: train each to its end before the next, one in memory at a time (the paper's Asy-InfoPro)."""
    cache: Annotated[bool, NOTHING] = True
    """With order sequential: keep the outputs of the trained modules on disk.
    Otherwise they are computed again for every batch."""
    cached_epochs: Annotated[int | None, at_least(1), SAID, RESULT] = None
    """With order sequential: cache the augmented images of this many epochs, and use these in turn.
    Default: of all epochs, which does not change the result."""

    parallel: Annotated[Literal["none", "data", "pipeline"], MACHINE] = "none"
    """Train in the processes that torchrun starts.
    data: each takes a part of every batch.
    pipeline: each takes some of the modules."""
    sync_batch_norm: Annotated[bool, MACHINE] = False
    """With parallel data: batch norms see the images of all processes."""
    global_contrast: Annotated[bool, MACHINE] = False
    """With parallel data: contrast each image with those of all processes."""
    pipeline_modules: Annotated[tuple[int, ...] | None, SPANS, SAID, MACHINE] = None
    """With parallel pipeline: the number of modules of each process, from the first module on.
    Several times as many processes share every batch. Default: divided evenly."""
    wire: Annotated[Literal["exact", "bfloat16"], RESULT] = "exact"
    """With parallel pipeline: how features travel between processes.
    bfloat16 halves the bytes and rounds the features."""
    in_flight: Annotated[int, at_least(1), MACHINE] = 2
    """With parallel pipeline: batches that may be under way between two processes."""
    patience: Annotated[float | None, POSITIVE, SAID, NOTHING] = None
    """Stop after this many seconds without progress; single images and parts of files count as progress.
    Default: 20 for several processes, no limit for one."""

    recipe: Annotated[str | None, SAID, NOTHING] = None
    """Train this row of the paper's tables; `infopro-fast recipes` lists them. Other flags override it.
    Several processes train what one would."""
    out: Annotated[Path | None, SAID, NOTHING] = None
    """Run folder to create. Default: runs/ and a name made of the settings and the time."""
    checkpoint_minutes: Annotated[float, POSITIVE, NOTHING] = 10.0
    """Write a checkpoint this often, besides one after every epoch."""
    log_every: Annotated[int, at_least(1), NOTHING] = 20
    """Steps between two readings of the losses; a loss that is not finite is found then."""

    def __post_init__(self):
        self._convert_and_check()
        if self.plan is not None:
            _take_plan(self)
            self._convert_and_check()
        rules.check(self)

    @classmethod
    def unchecked(cls, **settings: Any) -> TrainConfig:
        """Return settings of which only each value is checked, not what they say together.

        They are defaults that flags will complete: a recipe of CIFAR-10 without its data_root, for example.
        """
        fields.check_names(cls, settings)
        config = object.__new__(cls)
        for field in fields.of(cls).values():
            object.__setattr__(config, field.name, settings.get(field.name, field.default))
        config._convert_and_check()
        return config

    def _convert_and_check(self) -> None:
        for field in fields.of(TrainConfig).values():
            object.__setattr__(self, field.name, field.convert(getattr(self, field.name)))
            field.check(getattr(self, field.name))

    def resolved(self) -> TrainConfig:
        """Return the same settings with every default of data set, network and machine written out.

        data_root becomes absolute, so that a run finds its images from any folder. For a run counted in
        iterations, `in_epochs` fills in the epochs, and the warm-up where the schedule has one and none was
        given.
        """
        recipe, K, arch, local_loss = self.usual, self.number_of_modules(), self.network, self.loss
        lambdas, crop, workers = self.lambdas, self.crop, self.workers
        if lambdas is None and local_loss in WEIGHTED and K > 1:
            planned = self.cuts is not None or self.budget is not None
            name = "" if planned else arch  # the published weights belong to the published splits
            side = self.image_size[0]
            lambdas = default_lambdas(
                name, K, local_loss, balanced=self.balanced, image_size=side, dataset=self.dataset
            )
        filled: dict[str, Any] = {"arch": arch, "local_loss": local_loss}
        filled["modules"] = self.modules if self.budget else K
        filled |= {
            name: getattr(recipe, name) if getattr(self, name) is None else getattr(self, name)
            for name in ("epochs", "batch_size", "lr", "schedule", "warmup", "weight_decay", "iterations")
        }
        if self.epochs is not None:
            filled["iterations"] = self.iterations
        if self.warmup is None:
            later = filled["iterations"] is not None and filled["schedule"] in WARM
            warmup = recipe.default_warmup(filled["schedule"], filled["epochs"])
            filled["warmup"] = None if later else warmup
        if kind(self.dataset) == OWN:
            crop = self.image_size
        if self.dataset in FOLDERS:
            crop, workers = self.image_size, min(8, os.cpu_count() or 1) if workers is None else workers
        depth = AUX_DEPTH if local_loss == "auglocal" and K > 1 else None
        return dataclasses.replace(
            self, **filled, lambdas=lambdas, crop=crop, workers=workers,
            nesterov=self.nesterov and recipe.nesterov, drop_last=self.drop_last or recipe.drop_last,
            aux_depth=self.aux_depth or depth, threads=self.threads or machine.threads(),
            data_root=None if self.data_root is None else self.data_root.absolute(),
            device=machine.device() if self.device == "auto" else self.device,
        )

    def in_epochs(self, batches: int) -> TrainConfig:
        """Return this resolved config with its iterations as epochs of ``batches`` steps.

        The last epoch may be shorter. Raises ConfigError where a given warm-up is as long as the run.
        """
        if self.iterations is None:
            return self
        epochs, warmup = math.ceil(self.iterations / batches), self.warmup
        if warmup is None:
            warmup = self.usual.default_warmup(self.schedule, epochs)
        if self.schedule in WARM and warmup >= epochs:
            raise ConfigError(
                f"warmup {warmup}: expected fewer than the {epochs} epochs of {self.iterations} iterations"
            )
        return dataclasses.replace(self, epochs=epochs, warmup=warmup)

    def to_look_at(
        self, *, device: str | None = None, data_root: str | Path | None = None, threads: int | None = None
    ) -> TrainConfig:
        """Return the settings with which to evaluate a run that was trained with these.

        Nothing is downloaded. device, data_root, threads: in place of the run's. Another kind of device
        leaves out the precision and the kernels that only the run's device has.
        """
        device = device or self.device
        changes: dict[str, Any] = {"threads": threads or self.threads}
        if device.partition(":")[0] != self.device.partition(":")[0]:
            impl = "reference" if self.impl == "reference" else "auto"
            changes |= {"tf32": False, "cuda_graph": False, "impl": impl}
        changes["data_root"] = data_root or self.data_root
        return dataclasses.replace(self, device=device, download=False, **changes)

    @property
    def usual(self) -> Recipe:
        """What is trained on the data set unless settings say otherwise."""
        return RECIPES[kind(self.dataset)]

    @property
    def measures_colors(self) -> bool:
        """Whether mean and std are measured: none are given, and none are published."""
        return self.mean is None and kind(self.dataset) in (*MEASURED, OWN)

    @property
    def network(self) -> str:
        return self.arch or self.usual.arch

    @property
    def loss(self) -> str:
        return self.local_loss or self.usual.local_loss

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.crop or IMAGE_SIZES[kind(self.dataset)]
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.shrink, width // self.shrink

    def number_of_modules(self) -> int:
        if self.modules is not None:
            return self.modules
        if self.cuts is not None:
            return len(self.cuts) + 1
        return 1 if self.local_loss == "none" else self.usual.modules

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @staticmethod
    def from_json(text: str) -> TrainConfig:
        """Return the settings that `to_json` wrote. Raises ConfigError for any other text."""
        try:
            content = known(dict(json.loads(text)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"not the settings of a run: {error}") from error
        return TrainConfig(**content)


def known(content: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a file's content. Raises ConfigError for a name that is no setting."""
    state = content.get("optimizer_state", "float32")  # a setting of earlier versions
    if state != "float32":
        raise ConfigError(f"optimizer_state: expected float32, the only one that runs have, got {state}")
    # A run's file has the hash of the rest, which `run_folder.read_config` checks.
    content = {name: value for name, value in content.items() if name not in ("optimizer_state", "sha256")}
    fields.check_names(TrainConfig, content)
    return content


def _take_plan(c: TrainConfig) -> None:
    """Write what the plan says in place of settings at their defaults. The file is then not needed again."""
    try:
        plan = Plan.read(c.plan)
    except PlanError as error:
        raise ConfigError(f"plan: {error}") from error
    if plan.image_size != c.image_size:
        raise ConfigError(
            f"plan {c.plan} is for images of {plan.image_size}, dataset {c.dataset} has {c.image_size}"
        )
    for name in ("arch", "cuts", "recompute", "batch_size"):
        given, planned = getattr(c, name), getattr(plan, name)
        if given == fields.of(TrainConfig)[name].default:
            object.__setattr__(c, name, planned)
        elif given != planned and name != "batch_size":
            raise ConfigError(f"plan {c.plan} has {name} {planned}, not {given}")
    object.__setattr__(c, "plan", None)
