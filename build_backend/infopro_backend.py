"""PEP 517 build backend: setuptools, plus nvcc from PyPI as a build requirement when needed.

A static build requirement would make every build unpack 271 MB of CUDA compiler. Here the requirement exists
only if the tree has `csrc/cuda/*.cu`, the torch of the build environment has CUDA 13, no installed toolkit of
that major version is found, and `INFOPRO_NO_CUDA` is unset. setup.py asks the same function for the toolkit,
so the two cannot disagree.
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
from setuptools.build_meta import (  # noqa: F401  (hooks of setuptools that need no change)
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The parts of `cuda-toolkit[nvcc,cccl,cudart]`, by their own names: torch requires a cuda-toolkit without
# nvcc, and pip ignores the extras of an installed distribution.
_PARTS = ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl", "cuda-runtime")
PYPI_TOOLKIT = tuple(f"nvidia-{part}" for part in _PARTS)
PYPI_MAJOR = 13  # packages of this version share site-packages/nvidia/cu13, and so form a toolkit


class NoCuda(Exception):
    """Why the CUDA kernels are not built. `packages`: the requirements that would allow it, if any."""

    def __init__(self, reason: str, packages: tuple[str, ...] = ()):
        super().__init__(reason)
        self.packages = packages


def cuda_sources() -> list[str]:
    """Return the CUDA sources, relative to the root of the project."""
    return sorted(glob.glob(os.path.join("csrc", "cuda", "*.cu"), root_dir=ROOT))


def find_toolkit(torch_cuda: str | None) -> tuple[str, str]:
    """Return folder and version of the CUDA toolkit for a torch built with CUDA ``torch_cuda``.

    Tried in turn: CUDA_HOME or CUDA_PATH (and then nothing else), nvcc on PATH, /usr/local/cuda, the PyPI
    packages. Raise NoCuda with the reason if none fits.
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
    nothing = "found none (CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda)"
    # The minor version counts too: the packages share headers with the runtime that torch requires.
    packages = tuple(f"{name}=={torch_cuda}.*" for name in PYPI_TOOLKIT) if wanted == PYPI_MAJOR else ()
    raise NoCuda(expected + (f"but {'; '.join(rejected)}" if rejected else nothing), packages)


def toolkit_folders(home: str, kind: str) -> list[str]:
    """Return the "include" or "lib" folders of a toolkit, in the order to search them.

    pip spreads the PyPI packages over two folders. One holds torch's requirements, with the runtime of its
    CUDA version, and comes first. The other holds the packages of `_cuda_requirement`, which may bring a
    newer runtime.
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
    """Return the toolkit's folder as nvcc names it: the nvcc on PATH may be a wrapper script elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "--dryrun", "-c", os.path.join(folder, "x.cu")]
        dryrun = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    return os.path.realpath(top[1].strip() if top else os.path.join(os.path.dirname(nvcc), ".."))


def nvcc_version(home: str) -> str | None:
    """Return the release of a toolkit's nvcc, such as "13.0"; None if it does not run."""
    try:
        command = [os.path.join(home, "bin", "nvcc"), "--version"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+\.\d+)", output)
    return release[1] if release else None


def _cuda_requirement() -> list[str]:
    if not cuda_sources():
        return []
    import torch  # a static build requirement, installed when this hook is called

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
    # setuptools packs all that earlier builds left in build/lib*, even files deleted since.
    for stale in glob.glob(os.path.join(ROOT, "build", "lib*")):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
