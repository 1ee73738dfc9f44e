"""What this installation can do, and why not where it cannot: the text of ``infopro-fast info``."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess

import torch

import infopro_fast
from infopro_fast import ops

BUILD_RECORD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_build.json")


def collect() -> dict:
    """The facts of `report`, JSON-serialisable.

    versions: {"infopro_fast", "commit" (`commit`, None outside a checkout), "python", "torch", "triton" (None where it is not installed)}
    cpu: {"model", "isa" (instruction set of the kernels, None where they are not loaded), "threads"}
    cuda: {"device" (name, or None), "capability" (e.g. "9.0", or None), "reason" (why there is no device, or None)}
    build: the record written by setup.py, or None where nothing was built
    ops: for each op, for each device type at hand, {implementation: None if it can run, else the reason why it cannot}
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": {
            "infopro_fast": infopro_fast.__version__,
            "commit": commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "cpu": {"model": _cpu_model(), "isa": ops.cpu_isa(), "threads": torch.get_num_threads()},
        "cuda": _cuda(),
        "build": build_record(),
        "ops": {op: {device: ops.available(op, device) for device in devices} for op in ops.OPS},
    }


def report() -> str:
    """`collect` for people: a few lines on versions, processor and build, then every op with its implementations."""
    facts = collect()
    lines = [f"{name:<16}{text}" for name, text in _summary(facts)]
    for op, devices in facts["ops"].items():
        lines += ["", op]
        for device, implementations in devices.items():
            for implementation, reason in implementations.items():
                lines.append(f"  {implementation:<10} on {device + ':':<6}{'available' if reason is None else f'not available: {reason}'}")
    return "\n".join(lines)


@functools.cache
def commit() -> str | None:
    """Short hash of the checkout the package lies in, with + where package or kernels differ from it; None where it lies in none."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if os.path.realpath(git("rev-parse", "--show-toplevel")) != os.path.realpath(root):  # installed inside another project's
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "infopro_fast", "csrc")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def build_record() -> dict | None:
    """What setup.py wrote beside the kernels: torch and compiler used, CUDA kernels or the reason why there are none."""
    try:
        with open(BUILD_RECORD) as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def _summary(facts: dict):
    versions, cpu, cuda, build = facts["versions"], facts["cpu"], facts["cuda"], facts["build"]
    yield "infopro_fast", versions["infopro_fast"] + (f" ({versions['commit']})" if versions["commit"] else "")
    yield "python", versions["python"]
    yield "torch", versions["torch"]
    yield "triton", versions["triton"] or "not installed"
    kernels = f"kernels use {cpu['isa']}" if cpu["isa"] else "kernels not loaded"
    yield "CPU", f"{cpu['model']}, {kernels}, {cpu['threads']} thread{'s' if cpu['threads'] != 1 else ''}"
    yield "GPU", f"{cuda['device']}, compute capability {cuda['capability']}" if cuda["device"] else f"none: {cuda['reason']}"
    if build is None:
        yield "build", f"no {os.path.basename(BUILD_RECORD)} in {os.path.dirname(BUILD_RECORD)}: nothing was built there"
        return
    sanitized = ", with ASan and UBSan" if build["sanitize"] else ""
    yield "build", f"for torch >= {build['torch_target']} (built on {build['torch']}, {build['compiler']}){sanitized}"
    made = build["cuda"]
    how = f"nvcc {made['nvcc']}, {' '.join(made['architectures'])}" if made["built"] else f"not built: {made['reason']}"
    yield "CUDA kernels", how


def _cuda() -> dict:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "reason": None}
    built = torch.version.cuda or torch.version.hip
    return {"device": None, "capability": None, "reason": "torch sees no device" if built else "torch was built without GPU support"}


def _cpu_model() -> str:
    """The processor's name as the kernel gives it, else its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            name = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        name = None
    return name[1] if name else platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance() -> dict:
    """Return where a result was made, for the JSON of tables and analyses, without names of folders or hosts.

    The keys are "cpu" (model), "cpus", "isa" (of the kernels), "gpu" (or None), "torch", "infopro_fast" and
    "commit" (None outside a checkout).
    """
    facts = collect()
    versions = facts["versions"]
    return {
        "cpu": facts["cpu"]["model"], "cpus": os.cpu_count(), "isa": facts["cpu"]["isa"],
        "gpu": facts["cuda"]["device"],
        **{name: versions[name] for name in ("torch", "infopro_fast", "commit")},
    }  # fmt: skip
