"""Which settings exclude each other: a table of (when, what is wrong), read from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from infopro_fast.errors import ConfigError
from infopro_fast.published import WEIGHTED

from . import fields
from .data_sets import (
    CIFAR_RESNETS,
    EMBEDDED,
    FOLDERS,
    IMAGE_SIZES,
    MEASURED,
    OWN,
    SEGMENTATION,
    SEGMENTERS,
    WARM,
)
from .data_sets import kind as kind_of

Rule = tuple[Callable[[Any], bool], str]


def check(config: Any) -> None:
    """Raise ConfigError with the sentence of the first rule that a `TrainConfig` breaks."""
    facts = _facts(config)
    for broken, sentence in RULES:
        if broken(facts):
            raise ConfigError(sentence.format_map(vars(facts)))


def _facts(c: Any) -> SimpleNamespace:
    """Return the settings with the defaults of the data set filled in, and what follows from them.

    given: names of the settings that are not at their own default; fetch: how to get the images; side: of the
    images; aux: whether some module has the auxiliary networks of InfoPro and greedy SL; ends: the number of
    modules that cuts can end.
    """
    recipe, K, loss, kind = c.usual, c.number_of_modules(), c.loss, kind_of(c.dataset)
    schedule, epochs = c.schedule or recipe.schedule, c.epochs or recipe.epochs
    warmup = recipe.default_warmup(schedule, epochs) if c.warmup is None else c.warmup
    return SimpleNamespace(**{
        **vars(c), "modules": K, "local_loss": loss, "arch": c.network, "schedule": schedule,
        "epochs": epochs, "warmup": warmup,
        "fetch": "" if c.dataset in FOLDERS or c.download else ", and --download to fetch them into it",
        "side": IMAGE_SIZES[kind], "kind": kind, "ends": K - 1, "cut_at": len(c.cuts or ()),
        "given": {name for name, field in fields.of(type(c)).items() if getattr(c, name) != field.default},
        "aux": loss not in ("dgl", "auglocal", "none") and K > 1,
    })


def _given(names: str, wrong: Callable[[Any], bool], sentence: str) -> list[Rule]:
    """Return a rule for each of these settings, broken where the setting is given; {name} stands for it."""

    def broken(name: str) -> Callable[[Any], bool]:
        return lambda c: name in c.given and wrong(c)

    return [(broken(name), sentence.replace("{name}", name)) for name in names.split()]


RULES: list[Rule] = [
    # Images
    (lambda c: c.dataset in EMBEDDED and (c.data_root is not None or c.download),
     "dataset {dataset} comes with the package: it takes neither data_root nor download"),
    (lambda c: c.dataset in FOLDERS and c.download,
     "download: the files of {dataset} cannot be fetched without an account"),
    (lambda c: c.kind not in (*EMBEDDED, OWN) and c.data_root is None,
     "dataset {dataset} needs data_root, the folder with its original files: give --data-root DIR{fetch}"),
    (lambda c: c.init_partial and c.init is None, "init_partial: expected init, a file of weights"),
    (lambda c: (c.mean is None) != (c.std is None), "mean and std: expected both or neither"),
    *_given("mean std", lambda c: c.kind not in (*MEASURED, OWN), "{name}: dataset {dataset} has its own"),
    # Modules and their losses
    (lambda c: c.local_loss == "none" and c.modules != 1,
     "local_loss none trains end to end: expected modules 1, got {modules}"),
    (lambda c: (c.cuts is not None) + c.balanced + (c.budget is not None) > 1,
     "cuts, balanced, budget: a split is given, or balanced, or fits into a budget"),
    (lambda c: c.budget is not None and c.local_loss == "none",
     "budget: local_loss none trains end to end, there is nothing to split"),
    (lambda c: c.budget is not None and c.parallel == "pipeline",
     "budget and parallel pipeline: make a plan first: infopro-fast plan --budget {budget}"),
    (lambda c: c.arch_args is not None and ":" not in c.arch,
     "arch_args: arch {arch} has none: expected a name with a colon"),
    (lambda c: c.betas is not None and c.optimizer != "adamw", "betas: optimizer {optimizer} has none"),
    *_given("momentum nesterov", lambda c: c.optimizer != "sgd", "{name}: optimizer {optimizer} has none"),
    (lambda c: c.cuts is not None and c.cut_at != c.ends,
     "modules {modules} and cuts: expected {ends} cuts, got {cut_at}"),
    (lambda c: c.lambdas is not None and not (c.local_loss in WEIGHTED and c.modules > 1),
     "lambdas: local_loss {local_loss} with modules {modules} has nothing to weigh"),
    (lambda c: c.net_config is not None and c.local_loss in ("dgl", "auglocal", "none"),
     "net_config: local_loss {local_loss} has no such head"),
    (lambda c: c.modules == 1 and c.balanced, "balanced: modules 1 has nothing to split"),
    (lambda c: c.dataset in SEGMENTATION and c.arch not in SEGMENTERS,
     f"arch {{arch}} and dataset {{dataset}}: expected one of {', '.join(SEGMENTERS)}"),
    (lambda c: c.dataset not in SEGMENTATION and c.arch in SEGMENTERS,
     "arch {arch} and dataset {dataset}: expected a network that classifies"),
    (lambda c: c.dataset in SEGMENTATION and c.local_loss in ("contrast", "dgl", "infopro_l", "auglocal"),
     "local_loss {local_loss}: dataset {dataset} is segmented: expected softmax, greedy or none"),
    *_given("crop", lambda c: c.kind not in (*FOLDERS, OWN),
            "{name}: the images of {dataset} are in memory as they are"),
    *_given("workers", lambda c: c.dataset not in FOLDERS,
            "{name}: the images of {dataset} are in memory as they are"),
    *_given("shrink hold_out", lambda c: c.dataset in (*FOLDERS, *SEGMENTATION),
            "{name}: dataset {dataset} does not have it"),
    (lambda c: c.side in (32, 96) and c.crop is None and (c.side % c.shrink or c.side // c.shrink < 8),
     "shrink: expected a divisor of {side} that leaves at least 8 pixels, got {shrink}"),
    (lambda c: c.local_loss == "auglocal" and c.arch not in CIFAR_RESNETS,
     "local_loss auglocal takes its blocks from a CIFAR ResNet: "
     f"expected arch {', '.join(CIFAR_RESNETS)}, got {{arch}}"),
    *_given("mixup cutmix", lambda c: c.dataset in SEGMENTATION,
            "{name}: dataset {dataset} has labels of pixels"),
    *_given("mixup cutmix", lambda c: c.local_loss == "contrast",
            "{name}: local_loss contrast needs the label of each image: expected softmax, greedy or another"),
    *_given("mixup cutmix", lambda c: c.parallel == "pipeline" or c.order == "sequential",
            "{name}: expected order simultaneous, and parallel none or data"),
    (lambda c: c.aux_depth is not None and (c.local_loss != "auglocal" or c.modules == 1),
     "aux_depth: local_loss {local_loss} with modules {modules} has no such net"),
    *_given("net_config widen feature_dim", lambda c: not c.aux,
            "{name}: local_loss {local_loss} with modules {modules} has no such net"),
    # Arithmetic and device
    (lambda c: c.amp != "none" and c.dtype == "float64",
     "amp {amp} and dtype float64: autocast starts from float32"),
    (lambda c: c.amp == "float16" and c.cuda_graph,
     "amp float16 and cuda_graph: its gradient scaler is not captured; use bfloat16"),
    (lambda c: c.compile and c.recompute == "norm",
     "compile and recompute norm: compiled code decides itself what to keep"),
    *_given("tf32 cuda_graph", lambda c: c.device == "cpu", "{name} and device {device}: only a GPU has it"),
    (lambda c: c.impl == "cpu" and c.device not in ("auto", "cpu"),
     "impl cpu and device {device}: the CPU kernels run on the CPU"),
    (lambda c: c.impl in ("triton", "cuda") and c.device == "cpu",
     "impl {impl} and device cpu: these kernels run on a GPU"),
    # Learning rate
    (lambda c: c.schedule != "cosine" and not c.zero_last_epoch,
     "zero_last_epoch: schedule {schedule} has no such epoch"),
    (lambda c: c.schedule not in WARM and c.warmup,
     "schedule {schedule} has no warm-up, got warmup {warmup}"),
    # The epochs of a run counted in iterations are not known here: `TrainConfig.in_epochs` checks them.
    (lambda c: c.schedule in WARM and c.warmup >= c.epochs and c.iterations is None,
     "warmup {warmup}: expected fewer than the {epochs} epochs"),
    # Processes
    *_given("pipeline_modules wire in_flight", lambda c: c.parallel != "pipeline",
            "{name}: expected parallel pipeline, got parallel {parallel}"),
    *_given("sync_batch_norm global_contrast", lambda c: c.parallel == "none",
            "{name}: expected parallel data or pipeline, got parallel none"),
    (lambda c: c.sync_batch_norm and c.recompute == "norm",
     "sync_batch_norm and recompute norm: expected recompute none, block or sqrt, "
     "whose norms ask other processes once"),
    (lambda c: c.parallel != "none" and c.cuda_graph,
     "parallel {parallel} and cuda_graph: steps that talk to other processes are not captured"),
    (lambda c: c.pipeline_modules is not None and sum(c.pipeline_modules) != c.modules,
     "pipeline_modules: expected numbers of at least 1 whose sum is the {modules} modules, "
     "got {pipeline_modules}"),
    (lambda c: c.global_contrast and c.local_loss != "contrast",
     "global_contrast: local_loss {local_loss} contrasts nothing"),
    (lambda c: c.global_contrast and c.accumulate > 1,
     "global_contrast and accumulate: the images of all processes are contrasted at once"),
    # One module after the other
    *_given("cache cached_epochs", lambda c: c.order == "simultaneous",
            "{name}: expected order sequential, got order simultaneous"),
    (lambda c: c.order == "sequential" and c.parallel != "none",
     "order sequential and parallel {parallel}: one module is trained after the other"),
    (lambda c: c.order == "sequential" and c.modules == 1,
     "order sequential: modules 1 has nothing to train in turn"),
    (lambda c: not c.cache and c.cached_epochs is not None, "cached_epochs and no-cache: nothing is cached"),
    *_given("cuda_graph ema", lambda c: c.order == "sequential",
            "order sequential and {name}: not supported"),
]
