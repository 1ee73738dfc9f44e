"""Memory of a training step of many networks, cut by plan into K modules, against end to end.

    python -m benchmarks.networks            bytes of tensors without values; writes docs/networks.md
    python -m benchmarks.networks --run      real steps of some of them, each in a new process: the rise of
                                             the resident set beside the plan; adds them to the page
    python -m benchmarks.networks NAME...    only these, printed

A peak is what a step needs at its highest point beyond parameters, optimizer state and batch. Losses are
InfoPro's with a classifier (softmax), ours; no term is left out.
"""

from __future__ import annotations

import argparse
import json
import typing
import warnings
from pathlib import Path

import torch

import infopro_fast
from benchmarks.device import provenance
from infopro_fast.errors import PlanError
from infopro_fast.memory.resident import in_a_process, peak_above
from infopro_fast.plan_file import Plan
from infopro_fast.planning import plan
from infopro_fast.trainer.schedule import released_sgd
from infopro_fast.whole_files import replace_file

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
RUNS = Path(__file__).parent / "results" / "networks.json"
MODULES = (2, 4, 8)
BATCH, SIDE = 32, 224


class Network(typing.NamedTuple):
    """arch: as `build` takes it. size: side of the images, or (height, width)."""

    arch: str
    size: int | tuple[int, int] = SIDE
    batch_size: int = BATCH


NETWORKS = (
    *(Network(arch, 32, 128) for arch in ("resnet32", "resnet110", "densenet_bc_100_12")),
    *map(Network, ("resnet18", "resnet50", "resnet101", "resnet152", "resnext101_32x8d")),
    Network("deeplabv3_resnet101", (512, 1024), 4),
    *(Network(f"torchvision:{name}") for name in (
        "wide_resnet50_2", "vgg16_bn", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2",
        "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0", "regnet_y_400mf", "regnet_x_3_2gf",
        "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t",
    )),
    *(Network(f"timm:{name}") for name in (
        "resnet26d", "resnetv2_50", "convnextv2_atto", "efficientnet_lite0", "mobilenetv4_conv_small",
        "vit_tiny_patch16_224", "vit_small_patch16_224", "deit_tiny_patch16_224", "beit_base_patch16_224",
        "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "hiera_tiny_224",
        "mambaout_tiny", "poolformer_s12", "coatnet_nano_rw_224", "levit_128",
    )),
)  # fmt: skip


class Case(typing.NamedTuple):
    """A real step to make. modules: K; 1 is end to end."""

    network: Network
    modules: int


STEPS = (
    *(Case(Network("resnet101", SIDE, 4), K) for K in (1, 2, 4)),
    *(Case(Network("deeplabv3_resnet101", (512, 1024), 1), K) for K in (1, 2)),
    *(Case(Network("timm:vit_tiny_patch16_224", SIDE, 16), K) for K in (1, 4, 12)),
)


def planned(network: Network, modules: int, recompute: str = "none") -> Plan:
    return plan(
        network.arch, batch_size=network.batch_size, image_size=network.size, modules=modules,
        recompute=recompute,
    )


def row(network: Network) -> list[str]:
    """Return a line of the table: parameters, peak end to end, and what local modules need of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the shares say it
        whole = planned(network, 1)
        blocks = planned(network, 1, "block")
        peak = whole.end_to_end["peak"]
        cells = [network.arch, f"{sum(m.parameters for m in whole.modules) / 4e6:.1f} M"]
        size = network.size if isinstance(network.size, int) else "x".join(map(str, network.size))
        cells += [f"{network.batch_size} x {size}", f"{peak / 2**20:.0f}", _share(blocks.peak, peak)]
        for K in MODULES:
            for recompute in ("none", "block"):
                try:
                    cells.append(_share(planned(network, K, recompute).peak, peak))
                except PlanError:
                    cells.append("-")
    return cells


def _share(count: int, whole: int) -> str:
    return f"{100 * count / whole:.1f}"


HEADER = ["network", "parameters", "batch x side", "end to end, MiB", "checkpointed"]
HEADER += [f"K = {K}{how}" for K in MODULES for how in ("", ", recompute")]


def run_step(arch: str, batch_size: int, size: typing.Any, modules: int, threads: int) -> dict[str, object]:
    """Make two steps on random images and return the rise of the resident set. For a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = Network(arch, tuple(size) if isinstance(size, list) else size, batch_size)
    found = planned(network, modules)
    local_loss = "none" if modules == 1 else "softmax"
    how = {"image_size": network.size, "lambdas": None if modules == 1 else (1, 1, 1, 1)}
    net = infopro_fast.build(arch, local_loss=local_loss, plan=found, **how)
    trainer = infopro_fast.LocalTrainer(net, released_sgd(0.01))
    image = torch.randn(batch_size, 3, *found.image_size)
    labels = found.image_size if arch.startswith(("deeplab", "fcn")) else ()
    label = torch.randint(10, (batch_size, *labels))
    infopro_fast.trainer.check_finite(trainer.step(image, label))  # optimizer state is there afterwards
    resident = peak_above(lambda: trainer.step(image, label))
    return {"resident": resident, "planned": found.peak}


def run_steps(threads: int) -> list[dict[str, typing.Any]]:
    """Make the steps, print each, and return what was found."""
    rows, whole = [], 1
    for network, modules in STEPS:
        case = {"arch": network.arch, "batch_size": network.batch_size, "size": network.size}
        case |= {"modules": modules}
        found = in_a_process("benchmarks.networks:run_step", threads=threads, **case)
        whole = found["resident"] if modules == 1 else whole
        rows.append({**case, **found, "share": found["resident"] / whole})
        print(_step_text(rows[-1]), flush=True)
    return rows


def _step_text(row: dict[str, typing.Any]) -> str:
    planned, resident = (f"{row[name] / 2**20:.0f}" for name in ("planned", "resident"))
    off, share = f"{100 * (row['resident'] / row['planned'] - 1):+.0f} %", f"{100 * row['share']:.1f} %"
    batch = f"{row['batch_size']} x {row['size']}"
    return f"| {row['arch']} | {batch} | {row['modules']} | {planned} | {resident} | {off} | {share} |"


def page(rows: list[list[str]]) -> str:
    """Return docs/networks.md."""
    lines = [
        "# Networks", "",
        "Memory of a training step, planned for networks of this package, torchvision and timm: the highest "
        "point beyond parameters, optimizer state and batch. Columns K give it as percent of end to end; "
        "*recompute* and *checkpointed* run each block again in backward. `python -m benchmarks.networks` "
        "makes this page.", "",
        "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER),
        *("| " + " | ".join(cells) + " |" for cells in rows), "",
    ]  # fmt: skip
    if RUNS.is_file():
        found = json.loads(RUNS.read_text())
        where = ", ".join(str(found[name]) for name in ("device", "torch", "commit"))
        lines += [
            "## Real steps", "",
            f"The rise of a process's resident set during a step ({where}), beside the plan. It includes the "
            "workspaces of libraries, which no plan sees.", "",
            "| network | batch x size | K | planned, MiB | resident, MiB | beside the plan | of end to end |",
            "|---|---|---|---|---|---|---|", *map(_step_text, found["rows"]), "",
        ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks as the table has them")
    parser.add_argument("--run", action="store_true", help="make real steps, and add them to the page")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.run:
        content = {**provenance(), "rows": run_steps(arguments.threads)}
        replace_file(RUNS, (json.dumps(content, indent=1) + "\n").encode())
    rows = []
    for network in NETWORKS:
        if not arguments.names or network.arch in arguments.names:
            rows.append(row(network))
            print(" | ".join(rows[-1]), flush=True)
    if not arguments.names:
        replace_file(PAGE, page(rows).encode())


if __name__ == "__main__":
    main()
