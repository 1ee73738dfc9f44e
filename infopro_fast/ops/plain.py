"""Which layers a kernel may stand for: those whose call runs their class's own forward and nothing else."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

METHODS = ("forward", "_conv_forward", "_check_input_dim")  # those that torch's own layers call
PARAMETERS = {"weight", "bias"}  # what kernels take from a layer by its name, parametrised or not


def not_plain(layer: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Return what a call of ``layer`` would do beside the forward of one of ``kinds``, None if nothing.

    This is what `differs` returns, or a hook of all modules. A parametrised tensor is computed each time it
    is read, so a caller reads it once.
    """
    of_all = "hooks of all modules are registered" if _has_any_global_hook() else None
    return differs(layer, *kinds) or of_all


def differs(layer: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Return what ``layer`` itself does beside the forward of one of ``kinds``, None if nothing.

    A subclass, a method of the instance's own, a hook (of pruning, of torch.nn.utils.weight_norm), and a
    parametrisation of anything but weight and bias are such.
    """
    parametrised = parametrize.is_parametrized(layer)
    kind = parametrize.type_before_parametrizations(layer)
    if kind not in kinds:
        return f"{kind.__module__}.{kind.__qualname__} is not {' or '.join(k.__name__ for k in kinds)} itself"
    if parametrised and set(layer.parametrizations) - PARAMETERS:
        return f"{', '.join(sorted(set(layer.parametrizations) - PARAMETERS))} of it is parametrised"
    # the compiler of torch 2.10 cannot trace a loop over __dict__
    names = [n for n in METHODS if n in layer.__dict__] if torch.compiler.is_compiling() else layer.__dict__
    if any(callable(getattr(kind, name, None)) for name in names):
        return "a method of it was replaced"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks"
    return None
