"""A pipeline of two processes against one process: images a second, and the weights bit for bit.

    python -m benchmarks.pipeline_speed      writes benchmarks/results/pipeline_speed.json and prints a table

ResNet-32, K = 4, batch 128, the images of the package, float32, a thread a process, gloo. The cuts fill two
processes most evenly by the modules' times, measured here. Each round is a run of 32 steps of `infopro-fast
train` by one process, then by two under torchrun. Images a second are taken from a quarter to seven eighths
of the way, as in `scale_validation`. Medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from infopro_fast import figure
from infopro_fast.memory import scale
from infopro_fast.trainer import run_folder

from .device import provenance
from .scale_validation import layouts, measured, train

RESULT = Path(__file__).parent / "results" / "pipeline_speed.json"
BAR, BATCH, STEPS = 1.7, 128, 32


def same_weights(one: Path, two: Path) -> bool:
    a, b = (safetensors.torch.load_file(folder / run_folder.WEIGHTS) for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_round(net: scale.Network) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / name for name in ("one", "two")]
        (pipeline,) = (one for one in layouts(net) if (one.name, one.processes) == ("pipeline", 2))
        one, two = (
            train(net, processes, words, out, steps=STEPS, batch_size=BATCH)
            for processes, words, out in zip((1, 2), ([], pipeline.words()), outs)
        )
        found = {"one": one, "two": two, "ratio": two / one, "same_weights": same_weights(*outs)}
    print(found, flush=True)
    return found


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    net = measured(BATCH)
    rounds = [one_round(net) for _ in range(options.rounds)]
    ratio = statistics.median(row["ratio"] for row in rounds)
    same = all(row["same_weights"] for row in rounds)
    about = {**provenance(), "threads": 1, "cuts": net.cuts, "steps": STEPS}
    content = {**about, "rounds": rounds, "ratio": ratio, "same_weights": same}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    head = ["one process, images/s", "two", "ratio", f"at least {BAR}", "same weights"]
    one, two = (f"{statistics.median(row[name] for row in rounds):.0f}" for name in ("one", "two"))
    holds, equal = ("yes" if true else "NO" for true in (ratio >= BAR, same))
    print(figure.aligned([head, [one, two, f"{ratio:.3g}", holds, equal]]))


if __name__ == "__main__":
    main()
