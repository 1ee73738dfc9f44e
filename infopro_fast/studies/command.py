"""The commands `infopro-fast analyze` and `reproduce`. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from infopro_fast.trainer.settings.fields import SAID

from .tables import Study


@dataclass(frozen=True)
class Analyze:
    """Measure what each block of trained networks still knows of image and label.

    Fresh probes are trained on the frozen features. Averages runs that differ only in their seed. Writes
    analysis.json, a table (analysis.md) and curves over depth (analysis.png). docs/analysis.md explains what
    is estimated. A second call skips the runs in analysis.json.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders that `train` wrote: one data set and network, any methods and seeds."""
    out: Path = Path("analysis")
    """Folder to write into."""
    depths: int = 8
    """Blocks to probe, evenly spread, with the first and the last. A network with fewer: every block."""
    epochs: int = 5
    """Passes of the probes over the training images."""
    classifier: Literal["1c2f", "residual"] = "1c2f"
    """Probe for I(h, y): the authors' auxiliary classifier, or three residual blocks.
    The blocks find more and take longer."""
    batch_size: int = 128
    """Images in a step."""
    lr: float = 1e-2
    """Adam's learning rate at the beginning; it falls to 0."""
    seed: int = 0
    """Seed of the probes: their initial weights, the image order, and the images that choose the epoch."""
    threads: Annotated[int | None, SAID] = None
    """CPU threads. Default: torch's number."""
    device: Annotated[str | None, SAID] = None
    """cpu, cuda or cuda:N. Default: the runs' device."""
    data_root: Annotated[Path | None, SAID] = None
    """Folder with the files of the data set. Default: where the runs found them."""

    def run(self) -> None:
        from . import analyze, probes

        settings = probes.ProbeSettings(
            self.depths, self.epochs, self.batch_size, self.lr, self.seed, classifier=self.classifier
        )
        analyze.analyze(
            self.runs, self.out, settings, threads=self.threads, device=self.device, data_root=self.data_root
        )
        names = (analyze.JSON, analyze.TABLE, analyze.FIGURE)
        print("written: " + ", ".join(str(self.out / name) for name in names))


@dataclass(frozen=True)
class Reproduce(Study):
    """Train the cells of one of the paper's tables with several seeds, and write the table and its figures.

    The paper's numbers stand beside ours. Finished runs are not trained again and interrupted runs continue,
    so the same command continues a stopped study.
    """

    def run(self) -> None:
        from .reproduce import reproduce

        paths = reproduce(self)
        print(paths[0].read_text(), end="")
        print("written: " + ", ".join(map(str, paths)))
