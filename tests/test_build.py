"""The build: what the objects demand of a machine, what a wheel contains, how nvcc is found or missed.

The first tests look at the objects of this installation. The wheel tests build a copy of the project around
kernels of one line.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch
from torch_abi_audit.inspect import inspect_extension

import infopro_fast
from infopro_fast import info, ops

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = os.path.dirname(os.path.abspath(infopro_fast.__file__))


def run(*command, **options) -> str:
    """Return the stdout of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ------------------------------------------------------------------------------------------------------------
# The objects of this installation


@pytest.fixture(params=["_cpu", "_cuda"])
def built(request, cpu) -> str:
    """Return the path of an object that the build record says was built."""
    record = info.build_record()
    assert record is not None, f"{info.BUILD_RECORD} is missing beside the kernels"
    path = os.path.join(PACKAGE, f"{request.param}.abi3.so")
    if request.param == "_cuda" and not record["cuda"]["built"]:
        assert not os.path.exists(path), "the record denies an object that is there"
        pytest.skip(f"no CUDA kernels: {record['cuda']['reason']}")
    assert os.path.exists(path), sorted(os.listdir(PACKAGE))
    return path


def assert_portable(path):
    """Assert any torch from 2.10 on, any Python, no relocated code, no executable stack, no other library."""
    verdict = inspect_extension(path)
    assert verdict.error is None
    assert verdict.torch.uses_torch and verdict.torch.stable, verdict.torch.unstable_symbols
    assert verdict.torch.unknown_shim_symbols == ()
    oldest = tuple(int(n) for n in verdict.torch.min_torch_version.split(".")[:2])
    assert oldest <= (2, 10), verdict.torch.version_defining_symbols
    undefined = run("nm", "-D", "--undefined-only", path)
    assert re.findall(r"_ZN?K?(?:2at|3c10|5torch)\S*", undefined) == []
    assert re.findall(r" _?Py\w+", undefined) == []
    dynamic = run("readelf", "-dW", path)
    assert "TEXTREL" not in dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic))
    allowed = {"libtorch_cpu", "libtorch_cuda", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-64"}
    allowed |= {"libasan", "libubsan"}
    assert needed <= allowed, needed - allowed
    stack = re.search(r"GNU_STACK.* (R\w*) +0x", run("readelf", "-lW", path))
    assert stack and "E" not in stack[1]


def test_objects_are_portable(built):
    assert_portable(built)


def test_wide_instructions_only_in_the_code_of_their_isa(cpu):
    """A function that every processor runs must hold no AVX instruction.

    That includes inline functions of the standard library: the linker keeps one copy, possibly from the file
    compiled for AVX-512.
    """
    registers = {}  # function -> widest vector register it names, in bits
    function = None
    command = ("objdump", "-d", "--no-show-raw-insn", "-C", os.path.join(PACKAGE, "_cpu.abi3.so"))
    for line in run(*command).splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = header[1]
        elif wide := re.search(r"%([yz])mm|\tv[a-z]\S*\s.*%(x)mm", line):
            bits = {"y": 256, "z": 512, "x": 128}[wide[1] or wide[2]]
            registers[function] = max(registers.get(function, 0), bits)
    outside = {name: bits for name, bits in registers.items() if not re.search(r"avx2|avx512", name)}
    assert outside == {}
    assert {bits for name, bits in registers.items() if "avx512" in name} >= {512}
    assert max(bits for name, bits in registers.items() if "avx2" in name and "avx512" not in name) == 256


def test_isa_in_force_is_the_processors(cpu):
    with open("/proc/cpuinfo") as file:
        flags = set(re.search(r"^flags\s*:(.*)$", file.read(), re.MULTILINE)[1].split())
    avx2 = {"avx2", "fma"} <= flags
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    before = torch.ops.infopro_fast._isa(-1)
    try:
        highest = torch.ops.infopro_fast._isa(2)
        assert highest == (2 if avx512 and avx2 else 1 if avx2 else 0)
        for level in range(highest + 1):
            assert torch.ops.infopro_fast._isa(level) == level
            assert torch.ops.infopro_fast._isa(-1) == level
            assert ops.cpu_isa() == ("baseline", "avx2", "avx512")[level]
    finally:
        torch.ops.infopro_fast._isa(before)


# ------------------------------------------------------------------------------------------------------------
# A wheel, of a copy of the project around kernels of one line

CPU_SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "../level.h"

int64_t level(const torch::stable::Tensor& x) { return LEVEL + x.numel(); }

STABLE_TORCH_LIBRARY(infopro_wheel_test, m) { m.def("level(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(infopro_wheel_test, CPU, m) { m.impl("level", TORCH_BOX(&level)); }
"""

CUDA_SOURCE = """
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

__global__ void negate(float* x, int64_t n) { if (threadIdx.x < n) x[threadIdx.x] = -x[threadIdx.x]; }

int64_t level(const torch::stable::Tensor& x) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
  negate<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(x.mutable_data_ptr<float>(), x.numel());
  return static_cast<int64_t>(cudaGetLastError());
}

STABLE_TORCH_LIBRARY_IMPL(infopro_wheel_test, CUDA, m) { m.impl("level", TORCH_BOX(&level)); }
"""


@pytest.fixture
def project(tmp_path) -> str:
    """Return a copy of everything the build needs, with its own csrc/."""
    copy = tmp_path / "project"
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(os.path.join(ROOT, "infopro_fast"), copy / "infopro_fast", ignore=ignore)
    shutil.copytree(os.path.join(ROOT, "build_backend"), copy / "build_backend", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(os.path.join(ROOT, name), copy)
    (copy / "README.md").write_text("The text on the package's page.\n")
    (copy / "csrc" / "cpu").mkdir(parents=True)
    (copy / "csrc" / "cuda").mkdir()
    (copy / "csrc" / "level.h").write_text("#define LEVEL 40\n")
    (copy / "csrc" / "cpu" / "registration.cpp").write_text(CPU_SOURCE)
    return str(copy)


def build_environment(**variables) -> dict:
    ours = ("INFOPRO_SANITIZE", "INFOPRO_NO_CUDA", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH")
    ours += ("TORCH_CUDA_ARCH_LIST", "LD_PRELOAD")
    return {**{name: value for name, value in os.environ.items() if name not in ours}, **variables}


def build_wheel(project, **variables) -> tuple[zipfile.ZipFile, str]:
    """Build the wheel of ``project``; return it opened, and the folder it is unpacked to."""
    out = os.path.join(project, "dist")
    environment = build_environment(**variables)
    options = ("--no-build-isolation", "--no-deps", "-w", out)
    run(sys.executable, "-m", "pip", "wheel", *options, project, env=environment)
    (path,) = glob.glob(os.path.join(out, "*.whl"))
    assert os.path.basename(path) == f"infopro_fast-{infopro_fast.__version__}-cp310-abi3-linux_x86_64.whl"
    unpacked = os.path.join(project, "unpacked")
    wheel = zipfile.ZipFile(path)
    wheel.extractall(unpacked)
    return wheel, unpacked


def level_of(path) -> str:
    """Return what the op in an object gives."""
    script = f"import torch; torch.ops.load_library({path!r}); op = torch.ops.infopro_wheel_test.level"
    return run(sys.executable, "-c", f"{script}; print(op(torch.ones(2)))").strip()


@pytest.mark.slow
def test_wheel(project):
    stale = os.path.join(project, "build", "lib.linux-x86_64-cpython-310", "infopro_fast")
    os.makedirs(stale)
    for name in ("deleted_module.py", "_cuda.abi3.so"):
        with open(os.path.join(stale, name), "w"):
            pass
    wheel, unpacked = build_wheel(project, INFOPRO_NO_CUDA="1")

    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = glob.glob(os.path.join(ROOT, "infopro_fast", "**", "*py*"), recursive=True)
    sources = {os.path.relpath(p, ROOT) for p in files if p.endswith((".py", ".pyi", "py.typed"))}
    assert {"infopro_fast/py.typed", "infopro_fast/__init__.pyi"} <= sources
    embedded = os.path.join(ROOT, "infopro_fast", "data", "embedded", "*")
    data = {os.path.relpath(p, ROOT) for p in glob.glob(embedded)}
    assert data
    assert names == sources | data | {"infopro_fast/_cpu.abi3.so", "infopro_fast/_build.json"}

    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(metadata).decode()
    assert f"\nVersion: {infopro_fast.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert "\nRequires-Dist: torch>=2.10\n" in metadata
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
    with open(os.path.join(unpacked, "infopro_fast", "_build.json")) as file:
        record = json.load(file)
    assert record["torch"] == torch.__version__
    assert record["sanitize"] is False
    assert record["cuda"] == {"built": False, "reason": "this version has no CUDA kernels"}

    path = os.path.join(unpacked, "infopro_fast", "_cpu.abi3.so")
    assert_portable(path)
    assert level_of(path) == "42"


@pytest.mark.slow
def test_a_changed_header_is_compiled_again(project):
    def level() -> str:
        environment = build_environment(INFOPRO_NO_CUDA="1")
        run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=project, env=environment)
        return level_of(os.path.join(project, "infopro_fast", "_cpu.abi3.so"))

    assert level() == "42"
    with open(os.path.join(project, "csrc", "level.h"), "w") as file:
        file.write("#define LEVEL 50\n")
    assert level() == "52"


@pytest.mark.slow
def test_wheel_with_cuda_kernels(project, backend):
    try:
        _, nvcc = backend.find_toolkit(torch.version.cuda)
    except backend.NoCuda as reason:
        pytest.skip(f"no CUDA compiler: {reason}")
    with open(os.path.join(project, "csrc", "cuda", "level.cu"), "w") as file:
        file.write(CUDA_SOURCE)
    _, unpacked = build_wheel(project, FORCE_CUDA="1")
    found = ["8.0", "9.0+PTX"]
    if torch.cuda.is_available():
        found = ["{}.{}".format(*torch.cuda.get_device_capability())]
    with open(os.path.join(unpacked, "infopro_fast", "_build.json")) as file:
        assert json.load(file)["cuda"] == {"built": True, "nvcc": nvcc, "architectures": found}
    cpu, cuda = (os.path.join(unpacked, "infopro_fast", name) for name in ("_cpu.abi3.so", "_cuda.abi3.so"))
    assert_portable(cuda)
    needed = run("readelf", "-dW", cpu)
    assert "libtorch_cuda" not in needed, "a torch without CUDA could not load the CPU kernels"
    script = f"""
        import torch
        torch.ops.load_library({cpu!r})
        torch.ops.load_library({cuda!r})
        print(torch._C._dispatch_has_kernel_for_dispatch_key("infopro_wheel_test::level", "CUDA"))
        if torch.cuda.is_available():
            x = torch.ones(3, device="cuda")
            assert torch.ops.infopro_wheel_test.level(x) == 0 and x.tolist() == [-1.0] * 3
    """
    assert run(sys.executable, "-c", textwrap.dedent(script)).strip() == "True"


@pytest.mark.slow
def test_without_nvcc_the_package_builds_and_says_why(project):
    with open(os.path.join(project, "csrc", "cuda", "level.cu"), "w") as file:
        file.write(CUDA_SOURCE)
    nowhere = os.path.join(project, "nowhere")
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    log = run(*command, cwd=project, env=build_environment(CUDA_HOME=nowhere))
    with open(os.path.join(project, "infopro_fast", "_build.json")) as file:
        record = json.load(file)["cuda"]
    assert record["built"] is False
    expected = f"{nowhere} has no working bin/nvcc"
    if torch.version.cuda is None:
        expected = "the torch it was built with has no CUDA"
    assert expected in record["reason"]
    assert f"infopro_fast: CUDA kernels left out: {record['reason']}" in log
    assert os.path.exists(os.path.join(project, "infopro_fast", "_cpu.abi3.so"))

    environment = build_environment(CUDA_HOME=nowhere, FORCE_CUDA="1")
    forced = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert forced.returncode != 0
    assert f"FORCE_CUDA is set, but the CUDA kernels cannot be built: {record['reason']}" in forced.stderr


# ------------------------------------------------------------------------------------------------------------
# How nvcc is found


@pytest.fixture
def backend(monkeypatch):
    """The build backend's module, with nothing about CUDA in the environment."""
    for name in ("INFOPRO_NO_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(os.path.join(ROOT, "build_backend"))
    import infopro_backend

    return infopro_backend


def make_nvcc(path, release, top):
    """An executable that answers --version and --dryrun as nvcc does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/bin/sh\ncase $1 in --dryrun) echo '#$ _SPACE_= ' >&2; echo '#$ TOP={top}' >&2;; "
        f"*) echo 'Cuda compilation tools, release {release}, V{release}.88';; esac\n"
    )
    path.chmod(0o755)


@pytest.fixture
def bare(backend, monkeypatch, tmp_path):
    """The backend on a machine whose only CUDA is what the test puts into tmp_path."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/usr/local/cuda" and exists(path))
    return backend


def test_nvcc_on_path_may_be_a_wrapper(bare, tmp_path):
    make_nvcc(tmp_path / "toolkit" / "bin" / "nvcc", "13.0", top=f"{tmp_path}/toolkit/bin/..")
    make_nvcc(tmp_path / "path" / "nvcc", "13.0", top=f"{tmp_path}/toolkit/bin/..")
    assert bare.find_toolkit("13.0") == (str(tmp_path / "toolkit"), "13.0")


def test_nvcc_from_pypi(bare, tmp_path):
    make_nvcc(tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc", "13.0", top="unused")
    home = str(tmp_path / "site-packages" / "nvidia" / "cu13")
    assert bare.find_toolkit("13.0") == (home, "13.0")


def test_pypi_packages_spread_over_two_folders_are_one_toolkit(bare, tmp_path, monkeypatch):
    """torch's runtime comes first: pip puts what a hook asks for into a folder of its own."""
    first, second = (tmp_path / name / "nvidia" / "cu13" for name in ("site-packages", "other"))
    make_nvcc(second / "bin" / "nvcc", "13.0", top="unused")
    for folder in (first / "include", first / "lib", second / "include"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / name) for name in ("other", "site-packages", "other")])
    home, _ = bare.find_toolkit("13.0")
    assert home == str(second)
    assert bare.toolkit_folders(home, "include") == [str(first / "include"), str(second / "include")]
    assert bare.toolkit_folders(home, "lib") == [str(first / "lib")]


def test_cuda_home_is_taken_at_its_word(bare, tmp_path, monkeypatch):
    make_nvcc(tmp_path / "path" / "nvcc", "13.0", top=f"{tmp_path}/path")
    make_nvcc(tmp_path / "named" / "bin" / "nvcc", "13.1", top="unused")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert bare.find_toolkit("13.0") == (str(tmp_path / "named"), "13.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "missing"))
    with pytest.raises(bare.NoCuda, match="names .*missing has no working bin/nvcc") as error:
        bare.find_toolkit("13.0")
    assert error.value.packages == ()


def test_toolkit_of_another_major_version_is_passed_over(bare, tmp_path, monkeypatch):
    make_nvcc(tmp_path / "old" / "bin" / "nvcc", "12.4", top=f"{tmp_path}/old")
    monkeypatch.setenv("PATH", str(tmp_path / "old" / "bin"))
    message = f"expected nvcc 13.x, like the CUDA 13.0 of torch, but {tmp_path}/old has nvcc 12.4"
    with pytest.raises(bare.NoCuda, match=re.escape(message)):
        bare.find_toolkit("13.0")
    make_nvcc(tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc", "13.0", top="unused")
    assert bare.find_toolkit("13.0")[1] == "13.0"
    assert bare.find_toolkit("12.8") == (str(tmp_path / "old"), "12.4")


@pytest.mark.parametrize(("torch_cuda", "packages"), [("13.0", 5), ("13.2", 5), ("12.8", 0)])
def test_packages_are_asked_for_where_they_would_help(bare, torch_cuda, packages):
    with pytest.raises(bare.NoCuda, match="found none") as error:
        bare.find_toolkit(torch_cuda)
    assert len(error.value.packages) == packages
    assert all(requirement.endswith(f"=={torch_cuda}.*") for requirement in error.value.packages)


def test_requirements_of_a_build(bare, monkeypatch):
    monkeypatch.setattr(bare.build_meta, "get_requires_for_build_wheel", lambda settings=None: [])
    monkeypatch.setattr(bare.build_meta, "get_requires_for_build_editable", lambda settings=None: [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    hooks = (bare.get_requires_for_build_wheel, bare.get_requires_for_build_editable)
    monkeypatch.setattr(bare, "cuda_sources", list)
    assert [hook() for hook in hooks] == [[], []]
    monkeypatch.setattr(bare, "cuda_sources", lambda: ["csrc/cuda/x.cu"])
    for hook in hooks:
        assert "nvidia-cuda-nvcc==13.0.*" in hook()
    monkeypatch.setenv("INFOPRO_NO_CUDA", "1")
    assert [hook() for hook in hooks] == [[], []]
    monkeypatch.delenv("INFOPRO_NO_CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert [hook() for hook in hooks] == [[], []]


@pytest.mark.slow
def test_a_compiler_of_several_words_is_looked_for_by_its_first():
    """CXX may be "ccache g++"."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "no", "--build-temp", "no"]
    env = {**os.environ, "CXX": "no-such-cache g++", "INFOPRO_NO_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "expected a C++17 compiler, 'no-such-cache' is not on PATH" in done.stderr
