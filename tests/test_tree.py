"""The source tree: import circles, private names, lengths of files, widths of lines, docstrings."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("infopro_fast", "benchmarks", "tests", "build_backend", "csrc")
    for path in sorted((ROOT / folder).rglob("*.*"))
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
]
PYTHON = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCES
    if path.suffix == ".py"
}
PARSED = {module: ast.parse(path.read_text()) for module, path in PYTHON.items()}


def imports(module: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield (imported module, name taken from it or None, local name); imports in functions count."""
    for_types = {
        node
        for guard in ast.walk(PARSED[module])
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    for node in set(ast.walk(PARSED[module])) - for_types:
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".")[: None if PYTHON[module].stem == "__init__" else -1]
            parents = here[: len(here) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                local, submodule = alias.asname or alias.name, f"{source}.{alias.name}"
                yield (submodule, None, local) if submodule in PYTHON else (source, alias.name, local)


def test_no_circle_of_imports():
    graph = {module: {name for name, _, _ in imports(module)} for module in PYTHON}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_private_name_of_another_module():
    found = []
    for module, tree in PARSED.items():
        modules = {local: name for name, taken, local in imports(module) if taken is None and name in PYTHON}
        used = [(name, taken) for name, taken, _ in imports(module) if taken and name in PYTHON]
        used += [
            (modules[ast.unparse(node.value)], node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules
        ]
        found += [
            f"{module}: {name}.{taken}"
            for name, taken in used
            if taken.startswith("_") and not taken.startswith("__")
        ]
    assert not found


def test_files_are_short_and_lines_narrow():
    long, wide = [], []
    for path in SOURCES:
        name, lines = str(path.relative_to(ROOT)), path.read_text().splitlines()
        limit = 320 if name == "infopro_fast/trainer/loop.py" else 700
        if path.suffix == ".py" and "triton_kernels" not in name and len(lines) > limit:
            long.append(f"{name}: {len(lines)} lines")
        wide += [f"{name}:{number}" for number, line in enumerate(lines, 1) if len(line) > 110]
    assert not long
    assert not wide


def test_no_docstring_begins_with_of():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        f"{module}: {ast.get_docstring(node)}"
        for module, tree in PARSED.items()
        for node in ast.walk(tree)
        if isinstance(node, documented) and (ast.get_docstring(node) or "").startswith("Of ")
    ]
    assert not found
