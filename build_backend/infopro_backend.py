"""PEP 517 build backend: setuptools, with nvcc from PyPI as a build requirement where it is needed and nowhere else.

A static build requirement would make every build unpack 271 MB of CUDA compiler. Here the requirement exists only if the tree has
`csrc/cuda/*.cu`, the torch of the build environment has CUDA 13, no installed toolkit of that major version is found, and
`INFOPRO_NO_CUDA` is unset. setup.py asks the same function which toolkit to use, so the two cannot disagree.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that setuptools' own do)
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What `cuda-toolkit[nvcc,cccl,cudart]` consists of. By their own names: torch requires a cuda-toolkit without nvcc, and pip takes
# a distribution that is installed for satisfied, whatever extras it is asked for.
PYPI_TOOLKIT = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
PYPI_MAJOR = 13  # the major version whose packages share a folder, site-packages/nvidia/cu13, and so make a toolkit


class NoCuda(Exception):
    """Why the CUDA kernels are not built. `packages`: the requirements that would change that, if any."""

    def __init__(self, reason: str, packages: tuple[str, ...] = ()):
        super().__init__(reason)
        self.packages = packages


def cuda_sources() -> list[str]:
    """The CUDA sources, relative to the root of the project."""
    return sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "csrc", "cuda", "*.cu")))


def find_toolkit(torch_cuda: str | None) -> tuple[str, str]:
    """(folder, version) of the CUDA toolkit that compiles the kernels for a torch built with CUDA ``torch_cuda``.

    Tried in turn: CUDA_HOME or CUDA_PATH (and then nothing else), nvcc on PATH, /usr/local/cuda, the PyPI packages.
    Raises NoCuda with the reason if none will do.
    """
    if os.environ.get("INFOPRO_NO_CUDA"):
        raise NoCuda("INFOPRO_NO_CUDA was set")
    if torch_cuda is None:
        raise NoCuda("the torch it was built with has no CUDA")
    wanted = int(torch_cuda.split(".")[0])
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    rejected = []
    for home in [named] if named else _installed_toolkits():
        version = nvcc_version(home)
        if version is not None and int(version.split(".")[0]) == wanted:
            return home, version
        rejected.append(f"{home} has " + ("no working bin/nvcc" if version is None else f"nvcc {version}"))
    expected = f"expected nvcc {wanted}.x, like the CUDA {torch_cuda} of torch, "
    if named:
        raise NoCuda(f"{expected}but CUDA_HOME (or CUDA_PATH) names {'; '.join(rejected)}")
    found = "found none (CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda)" if not rejected else f"but {'; '.join(rejected)}"
    # The minor version too: these share headers with the runtime that torch requires.
    raise NoCuda(expected + found, tuple(f"{name}=={torch_cuda}.*" for name in PYPI_TOOLKIT) if wanted == PYPI_MAJOR else ())


def toolkit_folders(home: str, kind: str) -> list[str]:
    """The "include" or "lib" folders of a toolkit, in the order to search them.

    pip spreads the PyPI packages over two folders: torch's requirements, the runtime of its CUDA version among them, and what
    `_cuda_requirement` asked for, which may bring another, newer runtime. Torch's comes first.
    """
    homes = [home]
    if home in _pypi_toolkits():
        homes = sorted(_pypi_toolkits(), key=lambda other: os.path.exists(os.path.join(other, "bin", "nvcc")))
    names = ("lib64", "lib") if kind == "lib" else (kind,)
    return [folder for other in homes for name in names if os.path.isdir(folder := os.path.join(other, name))]


def _pypi_toolkits() -> list[str]:
    homes = (os.path.join(folder, "nvidia", f"cu{PYPI_MAJOR}") for folder in sys.path)
    return [home for home in dict.fromkeys(homes) if os.path.isdir(home)]


def _installed_toolkits():
    on_path = shutil.which("nvcc")
    if on_path:
        yield _toolkit_of(on_path)
    if os.path.exists("/usr/local/cuda"):
        yield "/usr/local/cuda"
    yield from (home for home in _pypi_toolkits() if os.path.exists(os.path.join(home, "bin", "nvcc")))


def _toolkit_of(nvcc: str) -> str:
    """The folder that this nvcc calls its own: the one on PATH may be a wrapper script, two levels above which lies no toolkit."""
    with tempfile.TemporaryDirectory() as folder:
        dryrun = subprocess.run([nvcc, "--dryrun", "-c", os.path.join(folder, "x.cu")], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    return os.path.realpath(top[1].strip() if top else os.path.join(os.path.dirname(nvcc), ".."))


def nvcc_version(home: str) -> str | None:
    """ "13.0" for the nvcc of that toolkit; None if it does not run."""
    try:
        output = subprocess.run([os.path.join(home, "bin", "nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+\.\d+)", output)
    return release[1] if release else None


def _cuda_requirement() -> list[str]:
    if not cuda_sources():
        return []
    import torch  # a static build requirement: there when this hook is called

    try:
        find_toolkit(torch.version.cuda)
    except NoCuda as reason:
        return list(reason.packages)
    return []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _cuda_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _cuda_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools packs whatever an earlier build left in build/lib*, files deleted since included.
    for stale in glob.glob(os.path.join(ROOT, "build", "lib*")):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
