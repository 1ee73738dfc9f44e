"""A training step of the paper's large networks: bytes kept for backward, K = 2 against end to end.

    python -m benchmarks.large_networks           bytes of fake tensors: nothing runs, and no memory is needed
    python -m benchmarks.large_networks --run     also makes the steps, each network in a new process, and
                                                  writes results/large_networks.json

With --run the bytes of real tensors are counted too. Cuts and weights of the losses are the published ones.
ResNet-101 takes 4 images of 224x224, DeepLabV3-ResNet-101 one of 512x1024. "saved" is the most that autograd
keeps at any time of a module's step (`memory.measure_step`).
"""

from __future__ import annotations

import argparse
import json
import typing
from pathlib import Path

import torch

import infopro_fast
from benchmarks.device import provenance
from infopro_fast.memory import measure_step
from infopro_fast.memory.resident import in_a_process, peak_above
from infopro_fast.planning import FakeTensorMode, build_fake, fake_batch
from infopro_fast.trainer.schedule import released_sgd

RESULT = Path(__file__).parent / "results" / "large_networks.json"


class Workload(typing.NamedTuple):
    arch: str
    batch_size: int
    size: tuple[int, int]
    bar: float  # saved bytes of the largest module over those of end to end, at most
    labels: tuple[int, ...] = ()


WORKLOADS = (
    Workload("resnet101", 4, (224, 224), 0.62),
    Workload("deeplabv3_resnet101", 1, (512, 1024), 0.55, (512, 1024)),
)


def network(arch: str, size: tuple[int, int], modules: int):
    return infopro_fast.build(arch, modules, "none" if modules == 1 else "softmax", image_size=size)


def saved_bytes(workload: Workload, modules: int) -> list[int]:
    """Return the saved bytes of every module, from a step on tensors without values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = build_fake(lambda: network(workload.arch, workload.size, modules))
        trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
        found = measure_step(trainer, *fake_batch(workload.batch_size, workload.size, workload.labels))
    return [module.saved for module in found.modules]


def run_step(
    arch: str, batch_size: int, size: list[int], labels: list[int], modules: int, threads: int
) -> dict[str, object]:
    """Make two steps on random images: return losses and the rise of the resident set, then the saved bytes.

    For a process of its own.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = network(arch, tuple(size), modules)
    trainer = infopro_fast.LocalTrainer(net, released_sgd(0.01))
    classes = net.classifier.class_num
    image, label = torch.randn(batch_size, 3, *size), torch.randint(classes, (batch_size, *labels))
    metrics: dict[str, torch.Tensor] = {}
    peak = peak_above(lambda: metrics.update(trainer.step(image, label)))
    infopro_fast.trainer.check_finite(metrics)
    saved = [module.saved for module in measure_step(trainer, image, label).modules]
    losses = {name: value.item() for name, value in metrics.items()}
    return {"resident": peak, "saved": saved, "losses": losses}


def run_steps(workload: Workload, threads: int) -> dict[str, object]:
    """Return what `run_step` found for K = 2 and end to end, and the ratios."""
    found = {}
    for modules in (2, 1):
        arch, batch_size, size, _, labels = workload
        case = dict(arch=arch, batch_size=batch_size, size=size, labels=labels, modules=modules)
        found[modules] = here = in_a_process("benchmarks.large_networks:run_step", threads=threads, **case)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in here["losses"].items())
        rose = f"the resident set rose by {here['resident'] / 2**20:.0f} MiB"
        print(f"  K = {modules}: runs; {losses}; saved {_mib(here['saved'])} MiB, {rose}", flush=True)
    local, whole = found[2], found[1]
    ratio, resident = max(local["saved"]) / max(whole["saved"]), local["resident"] / whole["resident"]
    print(f"  of end to end: saved {100 * ratio:.1f} %, resident {100 * resident:.1f} %")
    return {"run_k2": local, "run_k1": whole, "run_ratio": ratio, "resident_ratio": resident}


def _mib(values: list[int]) -> str:
    return " / ".join(f"{v / 2**20:.0f}" for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", action="store_true", help="make the steps too, and write the results")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, late = [], False
    for workload in WORKLOADS:
        local, (whole,) = saved_bytes(workload, 2), saved_bytes(workload, 1)
        row = {**workload._asdict(), "saved": local, "saved_end_to_end": whole, "ratio": max(local) / whole}
        batch = f"{workload.arch} {workload.batch_size}x3x{workload.size[0]}x{workload.size[1]}"
        ratio = f"{100 * row['ratio']:.1f} % (bar {100 * workload.bar:.0f} %)"
        saved = f"saved {_mib(local)} MiB a module, end to end {_mib([whole])} MiB"
        print(f"{batch}: {saved}: {ratio}", flush=True)
        if arguments.run:
            row |= run_steps(workload, arguments.threads)
        late |= max(row["ratio"], row.get("run_ratio", 0)) > workload.bar
        rows.append(row)
    if arguments.run:
        RESULT.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")
    raise SystemExit(1 if late else 0)


if __name__ == "__main__":
    main()
