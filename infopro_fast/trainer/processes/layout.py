"""Which process trains which modules, on which part of each batch.

With S processes a replica, rank r trains the modules of stage r mod S in replica r // S. Data parallelism is
S = 1, a pipeline is S = the number of processes, and values between combine both. One process is a layout of
one.
"""

from __future__ import annotations

import dataclasses

from infopro_fast.errors import ConfigError

from ..settings.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of process ``rank`` among ``size``. spans: the modules (from 0) of each stage."""

    rank: int
    size: int
    spans: tuple[range, ...]

    @staticmethod
    def alone(config: TrainConfig) -> Layout:
        """Return the place of a single process."""
        return Layout(0, 1, (range(config.number_of_modules()),))

    @property
    def stages(self) -> int:
        return len(self.spans)

    @property
    def stage(self) -> int:
        return self.rank % self.stages

    @property
    def replica(self) -> int:
        return self.rank // self.stages

    @property
    def replicas(self) -> int:
        return self.size // self.stages

    @property
    def modules(self) -> range:
        return self.spans[self.stage]

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == self.main

    @property
    def main(self) -> int:
        """The rank that writes the run folder: the last stage (it has the loss) of the first replica."""
        return self.stages - 1

    def ranks_of_stage(self, stage: int) -> list[int]:
        return [replica * self.stages + stage for replica in range(self.replicas)]

    @property
    def title(self) -> str:
        modules = "" if self.stages == 1 else f" ({self.name} of {self.spans[-1].stop})"
        return f"rank {self.rank}{modules}"

    @property
    def name(self) -> str:
        first, last = self.modules.start + 1, self.modules.stop
        return f"module {last}" if first == last else f"modules {first}-{last}"


def place_of(config: TrainConfig, rank: int, size: int) -> Layout:
    """Return the place of a process. Raises ConfigError where the processes do not fit the modules."""
    K = config.number_of_modules()
    counts = config.pipeline_modules if config.parallel == "pipeline" else (K,)
    if counts is None:
        if size > K:
            raise ConfigError(
                f"parallel pipeline: {size} processes for {K} modules: start {K} at most, or say with "
                "pipeline_modules how many modules each process trains, and a multiple of these processes "
                "shares the batch"
            )
        counts = tuple(K * (i + 1) // size - K * i // size for i in range(size))
    if sum(counts) != K:
        raise ConfigError(f"pipeline_modules {counts}: expected {K} modules in all, got {sum(counts)}")
    if size % len(counts):
        expected = f"expected a multiple of {len(counts)} processes"
        raise ConfigError(f"pipeline_modules {counts}: {expected}, got {size}")
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return Layout(rank, size, tuple(range(end - count, end) for count, end in zip(counts, ends)))
