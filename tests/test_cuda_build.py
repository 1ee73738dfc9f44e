"""nvcc's output for the CUDA kernels on every shipped architecture, and the built object without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import infopro_fast
from infopro_fast import info

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = os.path.dirname(os.path.abspath(infopro_fast.__file__))

# Everything that the launchers launch, without torch's headers: these take nvcc longer than the kernels do.
SOURCE = """
#include "cuda/chain_stage_launch.cuh"
#include "cuda/reconstruction_loss_launch.cuh"
auto forward = &infopro::gpu::Forward::run;
auto backward = &infopro::gpu::Backward::run;
auto loss_forward = &infopro::gpu::chain::LossForward::run;
auto loss_backward = &infopro::gpu::chain::LossBackward::run;
auto stage_forward = &infopro::gpu::chain::StageForward::run;
auto stage_backward = &infopro::gpu::chain::StageBackward::run;
"""
THREADS = {
    "decoder_prepare": 256, "decoder_statistics": 256, "decoder_loss": 256, "decoder_backward": 256,
    "decoder_overlap": 256, "decoder_norm": 256, "decoder_norm_backward": 256, "reduce_rows": 512,
    "chain_prepare": 256, "chain_loss": 256, "chain_gradient": 256, "chain_reduce_loss": 512,
    "chain_reduce": 512, "chain_stage": 256, "chain_stage_gradient": 256, "chain_outer": 256,
    "chain_statistics": 256,
}
VARIANTS = ("decoder_statistics", "decoder_loss", "decoder_backward")  # of two each
# for each operand: float32, TF32, bfloat16, float16
PRODUCTS = tuple(f"decoder_same_{step}" for step in ("prepare", "statistics", "loss", "backward"))
# two blocks to a multiprocessor
SWEEPS = (*VARIANTS, "chain_loss", "chain_gradient", "chain_stage", "chain_stage_gradient")
REGISTERS = 65536  # of a multiprocessor, on every architecture since 2012


@pytest.fixture(scope="module")
def backend():
    sys.path.insert(0, os.path.join(ROOT, "build_backend"))
    try:
        import infopro_backend
    finally:
        sys.path.pop(0)
    return infopro_backend


@pytest.fixture(scope="module")
def toolkit(backend, pytestconfig) -> str:
    if pytestconfig.getoption("--reference-only"):
        pytest.skip("--reference-only")
    try:
        return backend.find_toolkit(torch.version.cuda)[0]
    except backend.NoCuda as reason:
        pytest.skip(f"no nvcc: {reason}")


def resources(report: str) -> list[dict]:
    """Return the resources of each kernel from the output of `nvcc -Xptxas -v`."""
    found = []
    for entry in report.split("Compiling entry function '")[1:]:
        name = re.search(r"\d((?:decoder|chain|reduce)_\w*?)_kernel", entry)[1]
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        stack, stores, loads = map(int, memory.groups())
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(
            dict(
                name=name, stack=stack, spills=stores + loads, registers=registers,
                shared=int(shared[1]) if shared else 0,
            )
        )
    return found


def test_the_report_is_read():
    report = """
ptxas info : Compiling entry function '_ZN7infopro3gpu19decoder_loss_kernelILb0EEEvNS0_4CallEbPf' for 'sm_90'
    304 bytes stack frame, 44 bytes spill stores, 96 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 304 bytes cumulative stack size
ptxas info    : Compiling entry function '_ZN7infopro3gpu18reduce_rows_kernelEPKfiiPfS3_db' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4096 bytes smem
"""
    assert resources(report) == [
        dict(name="decoder_loss", stack=304, spills=140, registers=128, shared=0),
        dict(name="reduce_rows", stack=0, spills=0, registers=32, shared=4096),
    ]


@pytest.mark.parametrize("architecture", ("80", "86", "89", "90", "100", "120"))
@pytest.mark.slow
def test_nothing_spills(architecture, toolkit, tmp_path):
    nvcc = os.path.join(toolkit, "bin", "nvcc")
    codes = subprocess.run(
        (nvcc, "--list-gpu-code"), capture_output=True, text=True, check=True
    ).stdout.split()
    if f"sm_{architecture}" not in codes:
        pytest.skip(f"this nvcc knows no sm_{architecture}")
    (tmp_path / "kernels.cu").write_text(SOURCE)
    command = (
        nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Werror=all-warnings",
        f"-I{ROOT}/csrc", "-cubin",
    )
    done = subprocess.run(
        (*command, str(tmp_path / "kernels.cu"), "-o", str(tmp_path / "kernels.cubin")), capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = resources(done.stdout + done.stderr)
    assert sorted(kernel["name"] for kernel in found) == sorted([*THREADS, *VARIANTS, *PRODUCTS * 4])
    for kernel in found:
        blocks = 2 if kernel["name"] in SWEEPS else 1
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
        assert kernel["registers"] * THREADS.get(kernel["name"], 256) * blocks <= REGISTERS, kernel
        assert kernel["shared"] <= 48 * 1024, kernel


def test_setup_ships_these_architectures():
    with open(os.path.join(ROOT, "setup.py")) as file:
        shipped = re.search(r"CUDA_ARCHITECTURES = \((.*?)\)", file.read())[1]
    assert re.findall(r'"(.+?)"', shipped) == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


@pytest.fixture
def built(pytestconfig) -> str:
    """Return the object of this installation."""
    if pytestconfig.getoption("--reference-only"):
        pytest.skip("--reference-only")
    record = info.build_record()
    if record is None or not record["cuda"]["built"]:
        reason = "nothing is built" if record is None else record["cuda"]["reason"]
        pytest.skip(f"no CUDA kernels in this installation: {reason}")
    return os.path.join(PACKAGE, "_cuda.abi3.so")


def test_the_object_loads_without_a_gpu(built):
    """A process that sees no GPU loads it alone, and gets operators for CUDA tensors only."""
    script = f"""
        import torch
        from infopro_fast import ops
        torch.ops.load_library({built!r})
        ops_ = ("reconstruction_loss", "chain_loss", "chain_stage")
        names = [f"{{op}}_{{way}}" for op in ops_ for way in ("forward", "backward")]
        for name in (f"infopro_fast::{{name}}_cuda" for name in names):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name
        print(ops.available("reconstruction_loss", "cuda")["cuda"])
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        (sys.executable, "-c", textwrap.dedent(script)), capture_output=True, text=True, env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch sees no CUDA device\n"


def test_the_object_holds_code_for_what_the_record_says(built):
    backends = pytest.importorskip("triton.backends.nvidia")  # it has a cuobjdump, nvcc's package has none
    cuobjdump = os.path.join(os.path.dirname(backends.__file__), "bin", "cuobjdump")
    names = subprocess.run(
        (cuobjdump, "--list-elf", "--list-ptx", built), capture_output=True, text=True, check=True
    ).stdout
    for architecture in info.build_record()["cuda"]["architectures"]:
        code = architecture.removesuffix("+PTX").replace(".", "")
        assert f".sm_{code}.cubin" in names, names
        if architecture.endswith("+PTX"):
            assert f".sm_{code}.ptx" in names, names
