"""The paper's Tables 2 and 3: their cells, the settings of a cell at a scale, and the paper's numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from infopro_fast.errors import ConfigError
from infopro_fast.trainer.settings import recipes
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.settings.continuing import different
from infopro_fast.trainer.settings.data_sets import CIFAR_RESNETS, IMAGE_SIZES, Arch
from infopro_fast.trainer.settings.fields import SAID

Method = Literal[
    "e2e", "greedy", "dgl", "softmax", "contrast", "async", "checkpoint", "infopro_l", "auglocal"
]
NAMES = {
    "e2e": "end to end", "greedy": "greedy SL", "dgl": "DGL", "softmax": "InfoPro, softmax",
    "contrast": "InfoPro, contrast", "async": "InfoPro, contrast, asynchronous",
    "checkpoint": "end to end, checkpointed", "infopro_l": "InfoProL", "auglocal": "AugLocal",
    "plain": "InfoPro, contrast, plain losses",
}

PAPERS = {"cifar10": "CIFAR-10", "svhn": "SVHN", "stl10": "STL-10"}  # data sets of its Table 2

# "full" takes a day on two CPU cores, or minutes on a GPU. "paper" is the published recipe of one of PAPERS.
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {"shrink": 4, "epochs": 2, "batch_size": 64, "lr": 0.1, "schedule": "one_cycle", "warmup": 1},
    "small": {"shrink": 2, "epochs": 8, "batch_size": 64, "lr": 0.1, "schedule": "one_cycle", "warmup": 1},
    "full": {"epochs": 40, "batch_size": 128, "lr": 0.1, "schedule": "one_cycle", "warmup": 4},
}

# The paper does not give its softmax weights. Candidates (reconstruction and task, first and last module):
# ours, the published contrastive ones for K = 8 and 16, and little reconstruction.
CANDIDATES = ((5.0, 0.5, 0.5, 1.0), (5.0, 0.0, 0.0, 2.0), (5.0, 0.05, 0.2, 0.5), (1.0, 0.2, 0.1, 1.0))
HOLD_OUT = 1000  # training images that the search for weights tests on


@dataclass(frozen=True)
class Study:
    """Train the cells of one of the paper's tables, several seeds each, and write the table beside the
    paper's, and figures.

    What is there is not trained again, what was begun goes on, so that the same command continues a study
    that was stopped.
    """

    table: Annotated[Literal["table2", "table3", "lambdas", "fused"], tyro.conf.Positional]
    """table2: error by method and K. table3: memory of ResNet-110.
    lambdas: search for weights of the softmax loss, on held-out training images.
    fused: the kernels against plain PyTorch losses, in whole trainings."""
    scale: Literal["tiny", "small", "full", "paper"] = "small"
    """tiny, small: shrunk images, minutes a run. full: whole images, longer. paper: the published recipe."""
    methods: Annotated[tuple[Method, ...] | None, SAID] = None
    """Rows. Default: e2e greedy dgl softmax contrast; table3: e2e checkpoint contrast; lambdas: softmax."""
    modules: Annotated[tuple[int, ...] | None, SAID] = None
    """Columns: the numbers K of modules. Default: 2 4 8 16; table3: 2 3 4; lambdas: 8 16; fused: 4."""
    arch: Annotated[Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"] | None, SAID] = None
    """Network. Default: resnet32; table3: resnet110."""
    dataset: Literal["fashion_mnist", "fashion_mnist_full", "cifar10", "svhn", "stl10"] = "fashion_mnist"
    """Images: the embedded ones, the whole of Fashion-MNIST, or one of the paper's sets."""
    data_root: Annotated[Path | None, SAID] = None
    """Folder with the data set's original files."""
    seeds: int = 3
    """Number of runs of each cell, with seeds 0, 1, ..."""
    first_seed: int = 0
    """First seed."""
    epochs: Annotated[int | None, SAID] = None
    """Epochs. Default: the scale's."""
    jobs: int = 1
    """Number of runs at a time."""
    threads: int = 1
    """CPU threads of each run."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    train: bool = True
    """Train the missing runs. Otherwise write the table and figures of the finished runs."""
    measure: bool = True
    """Measure time and memory of a step of each cell, after the training."""
    known: tuple[Path, ...] = ()
    """Tables (JSON) of earlier studies with the same settings, from any machine. Their runs are taken."""
    out: Path = Path("reproduction")
    """Folder for the runs, the table (Markdown, JSON) and the figures."""

    def __post_init__(self):
        for name in ("seeds", "jobs", "threads", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected an integer of at least 1, got {value}")
        if self.first_seed < 0:
            raise ConfigError(f"first_seed: expected an integer of at least 0, got {self.first_seed}")
        if self.scale == "paper" and self.dataset not in PAPERS:
            what = "the published recipe is of cifar10, svhn and stl10"
            raise ConfigError(f"scale paper: {what}: give --dataset and --data-root")
        if self.modules is not None and (not self.modules or min(self.modules) < 2):
            raise ConfigError(f"modules: expected numbers of at least 2, got {self.modules}")

    @property
    def network(self) -> Arch:
        return self.arch or ("resnet110" if self.table == "table3" else "resnet32")


@dataclass(frozen=True)
class Cell:
    """A method with a number of modules. weights: its lambdas, in a study that compares them."""

    method: str
    modules: int
    weights: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        of_weights = "" if self.weights is None else "-l" + "_".join(f"{v:g}" for v in self.weights)
        return f"{self.method}-k{self.modules}{of_weights}"


@dataclass(frozen=True)
class Job:
    """One run: a cell with a seed."""

    cell: Cell
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return self.config.out


def cells(study: Study) -> list[Cell]:
    """Return the cells, row by row; methods without K have one cell."""
    default_methods = {
        "table2": ("e2e", "greedy", "dgl", "softmax", "contrast"),
        "table3": ("e2e", "checkpoint", "contrast"),
    }
    default_modules = {"table2": (2, 4, 8, 16), "table3": (2, 3, 4), "lambdas": (8, 16), "fused": (4,)}
    columns = study.modules or default_modules[study.table]
    if study.table == "fused" and study.methods is not None:
        raise ConfigError("methods: fused has its own")
    if study.table == "lambdas":
        methods = study.methods or ("softmax",)
        if not set(methods) <= {"softmax", "contrast"}:
            raise ConfigError(f"methods: lambdas are of softmax and contrast, got {methods}")
        return [Cell(*cell) for cell in itertools.product(methods, columns, CANDIDATES)]
    if study.table == "fused":
        return [Cell(*cell) for cell in itertools.product(("contrast", "plain"), columns)]
    found = []
    for method in study.methods or default_methods[study.table]:
        found += [Cell(method, 1)] if method in ("e2e", "checkpoint") else [Cell(method, K) for K in columns]
    return found


def jobs(study: Study) -> list[Job]:
    """Return all runs of a study, seed by seed, so that a stopped study has whole seeds.

    Raises ConfigError for a cell that cannot be trained.
    """
    _check_modules(study)
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    return [Job(cell, seed, config(study, cell, seed)) for seed in seeds for cell in cells(study)]


def _check_modules(study: Study) -> None:
    from infopro_fast.modules.backbones import BLOCKS  # imports torch, which --help does without

    blocks, most = 1 + 3 * BLOCKS[study.network], max(cell.modules for cell in cells(study))
    if most > blocks:
        expected = f"at most {blocks} for {study.network} (stem and {blocks - 1} blocks)"
        raise ConfigError(f"modules: expected {expected}, got {most}")


def config(study: Study, cell: Cell, seed: int) -> TrainConfig:
    """Return the settings of a run. Raises ConfigError for impossible ones."""
    images_and_network = f"{study.dataset}-{study.network}-{study.scale}"
    folder = study.out / "runs" / images_and_network / f"{cell.name}-seed{seed}"
    settings = _recipe(study, cell) if study.scale == "paper" else dict(SCALES[study.scale])
    if study.epochs is not None:
        settings["epochs"] = study.epochs
        settings["warmup"] = min(settings.get("warmup", 0), study.epochs - 1)
    settings |= _method(study, cell)
    settings |= {"threads": study.threads, "device": study.device, "data_root": study.data_root}
    return TrainConfig(dataset=study.dataset, arch=study.network, seed=seed, out=folder, **settings)


def _recipe(study: Study, cell: Cell) -> dict[str, Any]:
    """Return the published settings, without the cell's own."""
    every = [arch for dataset, arch in recipes.TABLE2 if dataset == study.dataset]
    networks = [arch for arch in every if arch in CIFAR_RESNETS]
    if study.network not in networks:
        expected = " or ".join(networks)
        got = f"got {study.network}: give --arch {networks[-1]}"
        raise ConfigError(f"scale paper: the paper has arch {expected} on {study.dataset}, {got}")
    known = recipes.row(f"table2/{study.dataset}/{study.network}/e2e").settings
    return {k: v for k, v in known.items() if k not in ("dataset", "arch", "local_loss", "modules")}


def _method(study: Study, cell: Cell) -> dict[str, Any]:
    if cell.method in ("e2e", "checkpoint"):
        recompute = {"recompute": "sqrt"} if cell.method == "checkpoint" else {}
        return {"local_loss": "none", "modules": 1, **recompute}
    found: dict[str, Any] = {"modules": cell.modules, "local_loss": cell.method}
    if cell.method == "async":
        found |= recipes.METHODS["async"][0]
    if cell.method == "plain":
        found |= {"local_loss": "contrast", "impl": "reference"}
    if cell.weights is not None:
        found |= {"lambdas": cell.weights, "hold_out": HOLD_OUT}
    if study.table == "table3":
        found |= _balanced(study, cell)
    return found


def _balanced(study: Study, cell: Cell) -> dict[str, Any]:
    """Return the published split by memory. It holds for shrunk images too, whose maps all shrink alike."""
    from infopro_fast.modules.split import BALANCED  # imports torch, which --help does without

    key = (study.network, IMAGE_SIZES[study.dataset], cell.modules)
    if key not in BALANCED:
        expected = f"(arch, image side, modules) {sorted(BALANCED)}"
        raise ConfigError(f"table3: the published balanced splits are of {expected}, got {key}")
    shrunk = study.scale != "paper" and SCALES[study.scale].get("shrink", 1) > 1
    return {"cuts": BALANCED[key]} if shrunk else {"balanced": True}


def papers_dataset(study: Study) -> str:
    """Return the data set of the paper's numbers beside a study's: the same one, or else CIFAR-10."""
    return study.dataset if study.dataset in PAPERS else "cifar10"


def published(study: Study, cell: Cell) -> tuple[float, float] | None:
    """Return the paper's mean and deviation of the test error (%) in this cell, or None."""
    if cell.weights is not None:
        return None
    dataset = papers_dataset(study)
    if study.table == "table3":
        found = _table3(study, cell)
        return found and found[0]
    of_method = recipes.TABLE2.get((dataset, study.network), {}).get(cell.method)
    return of_method.get(cell.modules) if isinstance(of_method, dict) else of_method


def published_memory(study: Study, cell: Cell) -> float | None:
    """Return the GB on a Titan Xp in this cell of the paper's Table 3, at the paper's batch size, or None."""
    found = _table3(study, cell) if study.table == "table3" else None
    return found and found[1]


def _table3(study: Study, cell: Cell):
    row = cell.modules if cell.method == "contrast" else cell.method
    return recipes.TABLE3.get(papers_dataset(study), {}).get(row)


def same_run(wanted: TrainConfig, there: TrainConfig) -> Sequence[str]:
    """Return the names of the result-changing settings in which a run differs from the one wanted."""
    return different(wanted.resolved(), there)
