"""Networks of other packages, by name: torchvision:NAME, timm:NAME or package.module:function."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

FORMS = "torchvision:NAME, timm:NAME or package.module:function"


def network(arch: str, num_classes: int | None, arguments: Mapping[str, Any]) -> nn.Module:
    """Return a network with random weights.

    num_classes: passed on if given. arguments: keyword arguments of the function that makes the network.
    Raises ValueError that names the part of ``arch`` which is wrong, ImportError for a missing package.
    """
    home, _, name = arch.partition(":")
    make = _maker(arch, home, name)
    given = dict(arguments) if num_classes is None else {"num_classes": num_classes, **arguments}
    try:
        net = make(**given)
    except TypeError as error:
        raise ValueError(f"build: arch: {arch} with the arguments {given}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"build: arch: {arch}: expected an nn.Module, got {type(net).__name__}")
    return net


def _maker(arch: str, home: str, name: str) -> Callable[..., Any]:
    if home == "torchvision":
        models = _imported("torchvision.models", arch)
        known, make = models.list_models(), lambda **given: models.get_model(name, weights=None, **given)
    elif home == "timm":
        timm = _imported("timm", arch)
        known, make = timm.list_models(), lambda **given: timm.create_model(name, **given)
    else:
        module = _imported(home, arch)
        known = [n for n, value in vars(module).items() if callable(value) and not inspect.ismodule(value)]
        make = getattr(module, name, None)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"build: arch: {home} has no {name!r}{hint}")
    return make


def _imported(module: str, arch: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the package is there, and misses another
        raise ImportError(f"build: arch: {arch} needs {error.name}, which is not installed") from error
