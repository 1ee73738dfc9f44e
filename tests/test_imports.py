"""Who may import what, what is imported at first use, and what a type checker sees of it."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_imports_point_one_way(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = os.path.join(ROOT, "pyproject.toml")
    status = lint_imports(config_filename=config, no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_what_is_imported_is_declared():
    """A fresh environment has what the package imports: its dependencies, or an extra that an error names."""
    project = (Path(ROOT) / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|data) = \[(.*)\]", project, re.M)
    declared = {re.match(r"[\w-]+", name)[0] for text in lists for name in re.findall(r'"([^"]+)"', text)}
    declared |= {"PIL", "triton"}  # with torchvision; with torch for CUDA
    imported = set()
    for path in (Path(ROOT) / "infopro_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    names = {"yaml": "pyyaml"}
    others = imported - sys.stdlib_module_names - {"infopro_fast"}
    assert {names.get(name, name) for name in others} <= declared


@pytest.mark.parametrize("package", ["infopro_fast", "infopro_fast.trainer", "infopro_fast.memory"])
def test_every_name_of_a_stub_is_there(package):
    module = importlib.import_module(package)
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(Path(module.__file__).with_suffix(".pyi").read_text()).body
        if isinstance(node, ast.Assign)
    )
    assert module.__all__ == names and set(names) <= set(dir(module))
    assert all(getattr(module, name).__name__.rpartition(".")[2] == name for name in names)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_packages_are_imported_without_torch():
    """The command line builds its help from them."""
    imports = "import infopro_fast.trainer.settings.config, infopro_fast.memory, infopro_fast.studies, sys"
    script = f"{imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_type_checker_sees_the_exports(tmp_path):
    """With every argument and its type; an unknown name is an error."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import infopro_fast\n"
        "reveal_type(infopro_fast.build)\n"
        "reveal_type(infopro_fast.LocalTrainer)\n"
        "infopro_fast.nothing\n"
    )
    # torch's files take a minute, and the package's faults are not the question here.
    settings = "[mypy]\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(settings)
    options = ["--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache", "--no-pretty"]
    command = [sys.executable, "-m", "mypy", *map(str, options), str(tmp_path / "user.py")]
    environment = {**os.environ, "MYPYPATH": ROOT}
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    build, trainer, unknown, _ = said.splitlines()
    net = "infopro_fast.modules.network.LocalNetwork"
    assert "modules: int | None" in build and build.endswith(f'-> {net}"'), said
    assert f"net: {net}, make_optimizer: def" in trainer, said
    assert re.search("error: Module has no attribute .nothing", unknown), said


def test_ops_need_torch_alone():
    """The process can import what torch imports, and nothing else that the package depends on."""
    script = """
        import sys

        PACKAGE = {"numpy", "scipy", "torchvision", "safetensors", "tyro", "rich", "matplotlib", "PIL"}

        class Blocker:
            allowed = None

            def find_spec(self, name, path=None, target=None):
                top = name.partition(".")[0]
                if top in PACKAGE or (self.allowed is not None and top not in self.allowed):
                    raise ModuleNotFoundError(f"blocked: {name}", name=name)

        blocker = Blocker()
        sys.meta_path.insert(0, blocker)
        import torch

        imported = {name.partition(".")[0] for name in sys.modules}
        blocker.allowed = {*sys.stdlib_module_names, "infopro_fast", *imported}
        from infopro_fast import ops

        def decoder():
            n = torch.nn
            first, last = n.Conv2d(4, 12, 3, padding=1), n.Conv2d(12, 3, 3, padding=1)
            return n.Sequential(first, n.BatchNorm2d(12), n.ReLU(), last, n.Sigmoid())

        reasons = ops.available("supcon_loss", "cpu")
        implementations = [name for name in reasons if reasons[name] is None]
        for impl in implementations:
            x, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 0, 1, 2, 2])
            loss = ops.supcon_loss(x, labels, impl=impl)
            loss = loss + ops.linear_cross_entropy(x, torch.randn(3, 5), labels, impl=impl)
            h, image = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 8, 8)
            loss = loss + ops.reconstruction_loss(h, image, decoder(), impl=impl)
            loss.backward()
            assert x.grad.abs().sum() > 0
        assert not PACKAGE & set(sys.modules)
        print("ran", *implementations)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("ran reference"), ran.stdout
