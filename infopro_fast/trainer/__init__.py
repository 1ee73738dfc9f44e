"""Training of networks in local modules."""

from typing import TYPE_CHECKING

__all__ = ["LocalTrainer", "TrainConfig", "check_finite", "evaluate_run", "fit", "released_sgd", "resume"]

if TYPE_CHECKING:
    from .run import evaluate_run, fit, resume
    from .schedule import released_sgd
    from .settings.config import TrainConfig
    from .step import LocalTrainer, check_finite
else:
    # Imported at first use: the command line reads `settings` alone, without torch.
    import importlib

    _HOMES = {
        "LocalTrainer": "step",
        "TrainConfig": "settings.config",
        "check_finite": "step",
        "evaluate_run": "run",
        "fit": "run",
        "released_sgd": "schedule",
        "resume": "run",
    }

    def __getattr__(name):
        if name in _HOMES:
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_HOMES})
