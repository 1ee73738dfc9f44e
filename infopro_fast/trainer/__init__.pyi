from .run import evaluate_run, fit, resume
from .schedule import released_sgd
from .settings.config import TrainConfig
from .step import LocalTrainer, check_finite

__all__ = ["LocalTrainer", "TrainConfig", "check_finite", "evaluate_run", "fit", "released_sgd", "resume"]
