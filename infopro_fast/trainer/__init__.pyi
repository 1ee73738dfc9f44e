from .run import evaluate_run, fit, resume
from .schedule import released_sgd
from .settings.config import TrainConfig
from .step import LocalTrainer, check_finite
from .trained import Trained, load

__all__ = [
    "LocalTrainer", "TrainConfig", "Trained", "check_finite", "evaluate_run", "fit", "load", "released_sgd",
    "resume",
]  # fmt: skip
