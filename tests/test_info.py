"""infopro_fast.info: what it says about an installation and about what is missing there."""

from __future__ import annotations

import json
import platform
import re
import subprocess

import pytest
import torch

import infopro_fast
from infopro_fast import info, ops
from infopro_fast.ops import dispatch


def test_collect_is_json_and_true():
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["infopro_fast"] == infopro_fast.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] == torch.__version__
    commit = facts["versions"]["commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{7,}\+?", commit)
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["isa"] == ops.cpu_isa()
    assert (facts["cuda"]["device"] is None) == (not torch.cuda.is_available())
    assert (facts["cuda"]["device"] is None) == (facts["cuda"]["reason"] is not None)


def test_every_implementation_of_every_op_is_listed():
    facts = info.collect()
    assert set(facts["ops"]) == set(ops.OPS)
    text = info.report()
    for op, devices in facts["ops"].items():
        assert devices["cpu"] == ops.available(op, "cpu")
        assert set(devices["cpu"]) == set(dispatch.IMPLEMENTATIONS)
        section = text[text.index(f"\n{op}\n") :].split("\n\n")[0]
        for implementation, reason in devices["cpu"].items():
            line = re.search(rf"^  {implementation} +on cpu: +(.+)$", section, re.MULTILINE)
            assert line and line[1] == ("available" if reason is None else f"not available: {reason}")


def test_kernels_that_do_not_load_are_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "load_cpu_kernels", lambda: "the object is damaged")
    facts = info.collect()
    assert facts["cpu"]["isa"] is None
    assert all(devices["cpu"]["cpu"] == "the object is damaged" for devices in facts["ops"].values())
    text = info.report()
    assert text.count("not available: the object is damaged") == len(ops.OPS)
    assert "kernels not loaded" in text


RECORD = {"torch": "2.12.0", "torch_target": "2.10", "compiler": "c++ 12.2.0", "sanitize": False}


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [

        (
            {"built": False, "reason": "INFOPRO_NO_CUDA was set"},
            "CUDA kernels    not built: INFOPRO_NO_CUDA was set",
        ),
        (
            {"built": True, "nvcc": "13.0", "architectures": ["9.0", "12.0+PTX"]},
            "CUDA kernels    nvcc 13.0, 9.0 12.0+PTX",
        ),
    ],
)
def test_build_record_is_told(tmp_path, monkeypatch, cuda, expected):
    path = tmp_path / "_build.json"
    path.write_text(json.dumps({**RECORD, "cuda": cuda}))
    monkeypatch.setattr(info, "BUILD_RECORD", str(path))
    assert info.collect()["build"] == {**RECORD, "cuda": cuda}
    lines = info.report().splitlines()
    assert expected in lines
    assert "build           for torch >= 2.10 (built on 2.12.0, c++ 12.2.0)" in lines


def test_missing_build_record_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "BUILD_RECORD", str(tmp_path / "_build.json"))
    assert info.collect()["build"] is None
    assert f"no _build.json in {tmp_path}: nothing was built there" in info.report()


def test_the_tested_versions_are_told():
    (line,) = [line for line in info.report().splitlines() if line.startswith("tested ")]
    pairs = line.removeprefix("tested").strip().split(", ")
    assert pairs == [f"torch {torch} with triton {triton}" for torch, triton in info.TESTED]


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("2.10.0", False), ("2.14.1+cpu", False), ("2.15.0+cu130", False), ("2.15.3", False),
        ("2.16.0", True), ("2.16.0.dev20261130+cpu", True), ("2.100.0", True), ("3.0.0", True),
        ("2.9.1", False),
    ],
)
def test_an_untested_newer_torch_is_named_and_not_refused(monkeypatch, version, newer):
    monkeypatch.setattr(torch, "__version__", version)
    (line,) = [line for line in info.report().splitlines() if line.startswith("torch ")]
    assert line == f"torch           {version}" + (" (not tested yet; please report)" if newer else "")


def test_an_untested_newer_triton_is_named(monkeypatch):
    monkeypatch.setattr(info.importlib.metadata, "version", {"triton": "3.10.0"}.__getitem__)
    assert "triton          3.10.0 (not tested yet; please report)" in info.report().splitlines()


def test_the_commit_is_of_the_package_own_checkout(tmp_path, monkeypatch):
    """Hash, + for what differs from it; None for a package inside another project's checkout."""

    def git(*args):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        ran = subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True, text=True)
        return ran.stdout.strip()

    package = tmp_path / "infopro_fast"
    package.mkdir()
    (package / "x.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(info, "__file__", str(package / "info.py"))
    find = info.commit.__wrapped__
    assert find() == git("rev-parse", "--short", "HEAD")
    (package / "x.py").write_text("2")
    assert find() == git("rev-parse", "--short", "HEAD") + "+"
    (tmp_path / "lib/infopro_fast").mkdir(parents=True)
    monkeypatch.setattr(info, "__file__", str(tmp_path / "lib/infopro_fast/info.py"))
    assert find() is None
    monkeypatch.setenv("PATH", "")
    assert find() is None
