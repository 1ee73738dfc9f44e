"""Who may import what: the contracts in pyproject.toml; ops need torch alone, settings do without it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from importlinter.cli import lint_imports

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# With this in front, a process finds nothing but what torch itself imports, and none of PACKAGES even then.
BLOCKER = """
import sys

PACKAGES = {"numpy", "scipy", "torchvision", "safetensors", "tyro", "rich", "matplotlib", "PIL"}

class Blocker:
    allowed = None

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in PACKAGES or (self.allowed is not None and top not in self.allowed):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

blocker = Blocker()
sys.meta_path.insert(0, blocker)
"""


def run(script: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", BLOCKER + textwrap.dedent(script)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_imports_point_one_way(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=os.path.join(ROOT, "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_ops_need_torch_alone():
    ran = run("""
        import torch

        blocker.allowed = {*sys.stdlib_module_names, "infopro_fast"}
        blocker.allowed |= {name.partition(".")[0] for name in sys.modules}
        from infopro_fast import ops

        def decoder():
            n = torch.nn
            hidden = n.Conv2d(4, 12, 3, padding=1), n.BatchNorm2d(12), n.ReLU()
            return n.Sequential(*hidden, n.Conv2d(12, 3, 3, padding=1), n.Sigmoid())

        reasons = ops.available("supcon_loss", "cpu")
        implementations = [name for name, reason in reasons.items() if reason is None]
        for impl in implementations:
            x, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 0, 1, 2, 2])
            h, image = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 8, 8)
            loss = ops.supcon_loss(x, labels, impl=impl)
            loss = loss + ops.linear_cross_entropy(x, torch.randn(3, 5), labels, impl=impl)
            loss = loss + ops.reconstruction_loss(h, image, decoder(), impl=impl)
            loss.backward()
            assert x.grad.abs().sum() > 0
        assert not PACKAGES & set(sys.modules)
        print("ran", *implementations)
    """)
    assert ran.startswith("ran reference"), ran


def test_settings_need_no_torch():
    run("""
        PACKAGES ^= {"tyro", "torch"}
        import importlib, pkgutil
        from infopro_fast.trainer import settings

        for module in pkgutil.iter_modules(settings.__path__):
            importlib.import_module(f"{settings.__name__}.{module.name}")
        settings.config.TrainConfig(dataset="cifar10", data_root=".")
    """)
