"""Time and memory of a step of a run, measured in a separate process."""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch

from infopro_fast.memory.resident import KEEPING, in_a_process
from infopro_fast.memory.step import measure_step
from infopro_fast.planning.live import seconds
from infopro_fast.trainer import schedule, setup
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.step import LocalTrainer

STEPS = 7  # timed, after two to warm up


def measure(config: TrainConfig) -> dict[str, float] | None:
    """Return {"seconds", "saved", "peak"} of a step of this run: the median time, and bytes (`StepMemory`).

    Returns None for sequential training, which has no step of the whole network.
    """
    if config.order != "simultaneous":
        return None
    settings = config.resolved().to_json()
    return in_a_process("infopro_fast.studies.costs:measure_here", malloc=KEEPING, settings=settings)


def measure_here(settings: str) -> dict[str, Any]:
    """Do the work of `measure` in this process. settings: as JSON."""
    config = TrainConfig.from_json(settings)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    images = setup.load_data(config)
    net, sgd = setup.build(config, images), schedule.released_sgd(config.lr)
    trainer = LocalTrainer(net, sgd, amp=setup.amp_dtype(config))
    batch = {"dtype": getattr(torch, config.dtype), "device": torch.device(config.device)}
    image, label = next(images.train_epoch(config.batch_size, seed=0, epoch=0, **batch))
    times = [seconds(lambda: trainer.step(image, label), config.device) for _ in range(2 + STEPS)][2:]
    memory = measure_step(trainer, image, label)
    return {"seconds": statistics.median(times), "saved": memory.saved, "peak": memory.peak}


def key(config: TrainConfig) -> str:
    """Return the key of a measurement: the settings that its result depends on."""
    free = ("seed", "out", "epochs", "warmup", "hold_out", "data_root")
    content = json.loads(config.resolved().to_json())
    return json.dumps({name: value for name, value in content.items() if name not in free}, sort_keys=True)
