"""Text of ``infopro-fast info``: what this installation can do, and why it cannot do the rest."""

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

# Versions of torch that the tests are run with, each with the Triton that it brings. Oldest first.
TESTED = (("2.10", "3.6"), ("2.14.1", "3.8"), ("2.15", "3.9"))


def collect() -> dict:
    """Return the facts of `report`, JSON-serialisable.

    versions: {"infopro_fast", "commit" (`commit`), "python", "torch", "triton" (None where it is not
    installed)}
    tested: {"torch": [versions], "triton": [versions]} of TESTED
    cpu: {"model", "isa" (instruction set of the kernels, None where they are not loaded), "threads"}
    cuda: {"device" (name, or None), "capability" (e.g. "9.0", or None), "reason" (why there is no device, or
    None)}
    build: the record written by setup.py, or None where nothing was built
    ops: for each op and each available type of device, {implementation: None if it can run, else the reason}
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
        "tested": dict(zip(("torch", "triton"), map(list, zip(*TESTED)))),
        "cpu": {"model": _cpu_model(), "isa": ops.cpu_isa(), "threads": torch.get_num_threads()},
        "cuda": _cuda(),
        "build": build_record(),
        "ops": {op: {device: ops.available(op, device) for device in devices} for op in ops.OPS},
    }


def report() -> str:
    """Return the facts of `collect` as text: versions, processor, build, each op's implementations."""
    facts = collect()
    lines = [f"{name:<16}{text}" for name, text in _summary(facts)]
    for op, devices in facts["ops"].items():
        lines += ["", op]
        for device, implementations in devices.items():
            for implementation, reason in implementations.items():
                state = "available" if reason is None else f"not available: {reason}"
                lines.append(f"  {implementation:<10} on {device + ':':<6}{state}")
    return "\n".join(lines)


@functools.cache
def commit() -> str | None:
    """Return the short hash of the package's own checkout; None outside one.

    A + follows where the package or the kernels differ from the commit.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*args: str) -> str:
        ran = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        # another project's checkout
        if os.path.realpath(git("rev-parse", "--show-toplevel")) != os.path.realpath(root):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "infopro_fast", "csrc")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def build_record() -> dict | None:
    """Return what setup.py wrote beside the kernels: torch, compiler, CUDA kernels or why there are none."""
    try:
        with open(BUILD_RECORD) as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def is_newer(version: str, tested: str) -> bool:
    """Whether a version ("2.16.0+cu130") is newer than a tested one ("2.15"); a patch of it is not."""
    release, last = ([int(n) for n in re.findall(r"\d+", v.partition("+")[0])[:2]] for v in (version, tested))
    return release > last


def _summary(facts: dict):
    versions, cpu, cuda, build = facts["versions"], facts["cpu"], facts["cuda"], facts["build"]
    commit_note = f" ({versions['commit']})" if versions["commit"] else ""
    yield "infopro_fast", versions["infopro_fast"] + commit_note
    yield "python", versions["python"]
    for name in ("torch", "triton"):
        tested = facts["tested"][name]
        new = versions[name] is not None and is_newer(versions[name], tested[-1])
        yield name, (versions[name] or "not installed") + (" (not tested yet; please report)" if new else "")
    pairs = zip(facts["tested"]["torch"], facts["tested"]["triton"])
    yield "tested", ", ".join(f"torch {torch} with triton {triton}" for torch, triton in pairs)
    kernels = f"kernels use {cpu['isa']}" if cpu["isa"] else "kernels not loaded"
    yield "CPU", f"{cpu['model']}, {kernels}, {cpu['threads']} thread{'s' if cpu['threads'] != 1 else ''}"
    if cuda["device"]:
        yield "GPU", f"{cuda['device']}, compute capability {cuda['capability']}"
    else:
        yield "GPU", f"none: {cuda['reason']}"
    if build is None:
        folder, name = os.path.split(BUILD_RECORD)
        yield "build", f"no {name} in {folder}: nothing was built there"
        return
    sanitized = ", with ASan and UBSan" if build["sanitize"] else ""
    tools = f"built on {build['torch']}, {build['compiler']}"
    yield "build", f"for torch >= {build['torch_target']} ({tools}){sanitized}"
    made = build["cuda"]
    if made["built"]:
        yield "CUDA kernels", f"nvcc {made['nvcc']}, {' '.join(made['architectures'])}"
    else:
        yield "CUDA kernels", f"not built: {made['reason']}"


def _cuda() -> dict:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "reason": None}
    built = torch.version.cuda or torch.version.hip
    reason = "torch sees no device" if built else "torch was built without GPU support"
    return {"device": None, "capability": None, "reason": reason}


def _cpu_model() -> str:
    """Return the processor's name as Linux gives it, else its architecture."""
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
    }
