"""One training step of the paper's large networks: bytes kept for backward, K = 2 against end to end, and that it runs.

    python -m benchmarks.large_networks           bytes from fake tensors: nothing is computed, no memory is needed
    python -m benchmarks.large_networks --run     also makes the step, each network in a process of its own, and says what the system saw

Published cuts and weights of the losses; ResNet-101 on 4 images of 224x224, DeepLabV3-ResNet-101 on one of 512x1024. "saved" is the
most that autograd keeps at any time of a module's step, each storage once, parameters and the batch left out (`memory.measure_step`).
"""

from __future__ import annotations

import argparse
import json
import typing
from pathlib import Path

import torch

import infopro_fast
from infopro_fast.memory import FakeTensorMode, build_fake, fake_batch, measure_step
from infopro_fast.memory.resident import in_a_process, peak_above
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
    """Of every module, from a step on tensors without values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = build_fake(lambda: network(workload.arch, workload.size, modules))
        trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
        found = measure_step(trainer, *fake_batch(workload.batch_size, workload.size, workload.labels))
    return [module.saved for module in found.modules]


def run_step(arch: str, batch_size: int, size: list[int], labels: list[int], modules: int, threads: int) -> dict[str, object]:
    """One step on random images: its losses, and the bytes that the resident set rose by. In a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = network(arch, tuple(size), modules)
    trainer = infopro_fast.LocalTrainer(net, released_sgd(0.01))
    classes = net.classifier.class_num
    image, label = torch.randn(batch_size, 3, *size), torch.randint(classes, (batch_size, *labels))
    metrics: dict[str, torch.Tensor] = {}
    peak = peak_above(lambda: metrics.update(trainer.step(image, label)))
    infopro_fast.trainer.check_finite(metrics)
    return {"resident": peak, "losses": {name: value.item() for name, value in metrics.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", action="store_true", help="make the steps too")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows, late = [], False
    for workload in WORKLOADS:
        local, (whole,) = saved_bytes(workload, 2), saved_bytes(workload, 1)
        ratio = max(local) / whole
        late |= ratio > workload.bar
        row = {**workload._asdict(), "saved": local, "saved_end_to_end": whole, "ratio": ratio}
        print(
            f"{workload.arch} {workload.batch_size}x3x{workload.size[0]}x{workload.size[1]}: saved "
            f"{' / '.join(f'{v / 2**20:.0f}' for v in local)} MiB a module, end to end {whole / 2**20:.0f} MiB: "
            f"{100 * ratio:.1f} % (bar {100 * workload.bar:.0f} %)"
        )
        if arguments.run:
            for modules in (2, 1):
                found = in_a_process(
                    "benchmarks.large_networks:run_step", arch=workload.arch, batch_size=workload.batch_size, size=workload.size,
                    labels=workload.labels, modules=modules, threads=arguments.threads,
                )  # fmt: skip
                row[f"run_k{modules}"] = found
                losses = ", ".join(f"{name} {value:.4f}" for name, value in found["losses"].items())
                print(f"  K = {modules}: runs; {losses}; the resident set rose by {found['resident'] / 2**20:.0f} MiB", flush=True)
        rows.append(row)
    RESULT.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    raise SystemExit(1 if late else 0)


if __name__ == "__main__":
    main()
