"""Who may import what: the contracts in pyproject.toml, and that the ops need torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from importlinter.cli import lint_imports

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_imports_point_one_way(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=os.path.join(ROOT, "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_ops_need_torch_alone():
    """Nothing outside torch's own imports is importable in this process, what the rest of the package depends on even before torch."""
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

        blocker.allowed = {*sys.stdlib_module_names, "infopro_fast", *(name.partition(".")[0] for name in sys.modules)}
        from infopro_fast import ops

        def decoder():
            n = torch.nn
            return n.Sequential(n.Conv2d(4, 12, 3, padding=1), n.BatchNorm2d(12), n.ReLU(), n.Conv2d(12, 3, 3, padding=1), n.Sigmoid())

        implementations = [name for name, reason in ops.available("supcon_loss", "cpu").items() if reason is None]
        for impl in implementations:
            x, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 0, 1, 2, 2])
            loss = ops.supcon_loss(x, labels, impl=impl)
            loss = loss + ops.linear_cross_entropy(x, torch.randn(3, 5), labels, impl=impl)
            loss = loss + ops.reconstruction_loss(torch.randn(2, 4, 4, 4), torch.rand(2, 3, 8, 8), decoder(), impl=impl)
            loss.backward()
            assert x.grad.abs().sum() > 0
        assert not PACKAGE & set(sys.modules)
        print("ran", *implementations)
    """
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("ran reference"), ran.stdout
