from . import data, modules, ops, trainer
from .modules.network import build
from .trainer.step import LocalTrainer

__version__: str
__all__ = ["LocalTrainer", "build", "data", "modules", "ops", "trainer"]
