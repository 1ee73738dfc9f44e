"""Training of networks in local modules."""

from .schedule import released_sgd
from .step import LocalTrainer, check_finite

__all__ = ["LocalTrainer", "check_finite", "released_sgd"]
