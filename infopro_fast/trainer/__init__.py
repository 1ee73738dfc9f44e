"""Training of networks in local modules."""

import importlib

# Imported at first use: the command line reads `settings` alone, without torch.
_HOMES = {
    "LocalTrainer": "step",
    "TrainConfig": "settings.config",
    "check_finite": "step",
    "evaluate_run": "run",
    "fit": "run",
    "released_sgd": "schedule",
    "resume": "run",
}

__all__ = ["LocalTrainer", "TrainConfig", "check_finite", "evaluate_run", "fit", "released_sgd", "resume"]


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES})
