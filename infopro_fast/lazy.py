"""Packages that import their names at first use, as their stub (`__init__.pyi`) lists them.

So `import infopro_fast.ops` needs torch alone, and the command line starts without torch. A type checker
reads the stub and sees every name with its type. The scheme is that of Scientific Python's SPEC 1.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path


def exports(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package. file: its `__init__.py`."""
    homes: dict[str, str | None] = {}  # the module that defines a name; None: the name is a module
    for node in ast.parse(Path(file).with_suffix(".pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: node.module for alias in node.names}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name] or name}")
        return getattr(module, name) if homes[name] else module

    return get, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)
