from . import data, memory, modules, ops, planning, trainer
from .planning.building import build
from .planning.planner import plan
from .trainer.step import LocalTrainer
from .trainer.trained import load

__version__: str
__all__ = ["LocalTrainer", "build", "data", "load", "memory", "modules", "ops", "plan", "planning", "trainer"]
