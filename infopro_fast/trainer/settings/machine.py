"""Settings whose default is what this machine has. The calls import torch, so that the settings do not."""

from __future__ import annotations


def device() -> str:
    """Return "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def threads() -> int:
    """Return the number of CPU threads that torch uses."""
    import torch

    return torch.get_num_threads()
