"""Compile csrc/cpu/ into infopro_fast/_cpu.abi3.so and, if there is an nvcc, csrc/cuda/ into _cuda.abi3.so.

Both are libraries of operators that torch loads, not Python modules. They use LibTorch's stable ABI: one
build runs with every later torch and Python. They are separate so that a torch without CUDA can load the
first. Environment, read here only:

    INFOPRO_NO_CUDA=1     leave out the CUDA kernels    FORCE_CUDA=1            fail if they cannot be built
    CUDA_HOME, CUDA_PATH  the toolkit to use            TORCH_CUDA_ARCH_LIST    e.g. "9.0;12.0+PTX", "all"
    MAX_JOBS              compilers at a time           INFOPRO_SANITIZE=1      ASan, UBSan on the CPU

Without TORCH_CUDA_ARCH_LIST the CUDA kernels are built for the GPUs of this machine; if it has none, for 8.0
and 9.0, which later GPUs run too. A wheel for every GPU wants "all".
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import setuptools

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(ROOT, "build_backend"))
from infopro_backend import NoCuda, cuda_sources, find_toolkit, toolkit_folders  # noqa: E402

try:
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    raise SystemExit(
        f"infopro_fast: building needs torch >= 2.10 ({error}). "
        "Leave out --no-build-isolation, or install torch and ninja first."
    ) from error
import torch  # noqa: E402

TORCH_TARGET = (2, 10)  # the oldest torch that the objects load into
# "all": A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
SANITIZE = bool(os.environ.get("INFOPRO_SANITIZE"))

# As system headers torch's headers give no warnings.
INCLUDES = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
DEFINES = [f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}"]
CXX_FLAGS = [
    "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas",
    # -std=c++17 turns contraction off. Most Pythons add -fwrapv, which hinders vectorisation and hides
    # overflow from UBSan.
    "-ffp-contract=fast", "-fno-math-errno", "-fno-wrapv",
    f"-ffile-prefix-map={ROOT}{os.sep}=",  # no folder of the build machine in the objects
]
OPTIMIZE = ["-O3", "-g0", "-DNDEBUG"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
DEBUG = ["-O1", "-g", "-UNDEBUG", *SANITIZERS]
TORCH_LIBRARIES = os.path.join(os.path.dirname(torch.__file__), "lib")
LINK_FLAGS = ["-Wl,--as-needed", "-Wl,-z,now", "-Wl,-z,relro", f"-L{TORCH_LIBRARIES}"]


def cpu_extension() -> setuptools.Extension:
    """Return the CPU kernels. Sources that need more than plain x86-64 set their own target."""
    sources = sorted(glob.glob("csrc/cpu/*.cpp", root_dir=ROOT))
    if not sources:
        raise SystemExit(f"infopro_fast: expected C++ sources in {ROOT}/csrc/cpu, found none")
    return setuptools.Extension(
        "infopro_fast._cpu",
        sources,
        depends=sorted(glob.glob("csrc/*.h", root_dir=ROOT) + glob.glob("csrc/cpu/*.h", root_dir=ROOT)),
        extra_compile_args=[*INCLUDES, *DEFINES, *CXX_FLAGS, *(DEBUG if SANITIZE else OPTIMIZE)],
        # -z defs: an undefined symbol is an error here, not at the user's first import.
        extra_link_args=[*LINK_FLAGS, *(SANITIZERS if SANITIZE else ["-Wl,-z,defs"]), "-ltorch_cpu"],
        language="c++",
        py_limited_api=True,
    )


def cuda_extension(home: str) -> setuptools.Extension:
    """Return the CUDA kernels, to be compiled by the toolkit in ``home``."""
    # BuildExtension reads both. Its own guess of the folder is wrong if the nvcc on PATH is a wrapper.
    cpp_extension.CUDA_HOME = home
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(_architectures(home))
    host = ["-fvisibility=hidden", "-fno-math-errno", "-fno-wrapv", "-Wno-psabi"]
    # -I: searched before nvcc's own
    includes = [*INCLUDES, *(f"-I{folder}" for folder in toolkit_folders(home, "include"))]
    return setuptools.Extension(
        "infopro_fast._cuda",
        cuda_sources(),
        depends=sorted(glob.glob("csrc/*.h", root_dir=ROOT) + glob.glob("csrc/cuda/*.*h", root_dir=ROOT)),
        extra_compile_args={
            "cxx": [*includes, *DEFINES, "-DUSE_CUDA", *CXX_FLAGS, *OPTIMIZE],
            "nvcc": [
                *includes, *DEFINES, "-DUSE_CUDA", "-std=c++17", "-O3", "-DNDEBUG", "--threads=1",
                f"-Xcompiler={','.join(host)}",
            ],
        },
        # With the static runtime the object does not depend on the CUDA minor version of torch.
        extra_link_args=[
            *LINK_FLAGS, "-Wl,-z,defs", "-Wl,--exclude-libs,ALL",
            *(f"-L{folder}" for folder in toolkit_folders(home, "lib")),
            "-ltorch_cuda", "-ltorch_cpu", "-lcudart_static", "-lrt", "-lpthread", "-ldl",
        ],
        language="c++",
        py_limited_api=True,
    )


def _architectures(home: str) -> list[str]:
    """Return the architectures to build for, as this module's documentation says."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    if asked not in ("", "all"):
        return asked.split(";")
    command = [os.path.join(home, "bin", "nvcc"), "--list-gpu-code"]
    codes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch.replace('.', '')}" in codes]
    if asked == "all":
        return [*known[:-1], known[-1] + "+PTX"]  # PTX is for later GPUs
    here = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    return [arch for arch in known if arch in here] or ["8.0", "9.0+PTX"]


def extensions() -> tuple[list[setuptools.Extension], dict]:
    """Return the extensions to build, and what the build record says about CUDA."""
    cpu = [cpu_extension()]
    if not cuda_sources():
        return cpu, {"built": False, "reason": "this version has no CUDA kernels"}
    try:
        home, version = find_toolkit(torch.version.cuda)
    except NoCuda as reason:
        if os.environ.get("FORCE_CUDA", "0") not in ("", "0"):
            message = f"infopro_fast: FORCE_CUDA is set, but the CUDA kernels cannot be built: {reason}"
            raise SystemExit(message) from reason
        return cpu, {"built": False, "reason": str(reason)}
    cuda = cuda_extension(home)
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].split(";")
    return [*cpu, cuda], {"built": True, "nvcc": version, "architectures": architectures}


class BuildKernels(cpp_extension.BuildExtension):
    """torch's BuildExtension, which also writes infopro_fast/_build.json: what was built, and why not all."""

    def run(self):
        _limit_jobs()
        compiler = shlex.split(cpp_extension.get_cxx_compiler())  # CXX may be "ccache g++"
        if not compiler or shutil.which(compiler[0]) is None:
            name = " ".join(compiler[:1])
            raise SystemExit(f"infopro_fast: expected a C++17 compiler, {name!r} is not on PATH")
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        record = {
            "torch": torch.__version__,
            "torch_target": "{}.{}".format(*TORCH_TARGET),
            "compiler": version.partition("\n")[0],
            "sanitize": SANITIZE,
            "cuda": CUDA_RECORD,
        }
        outcome = "built" if CUDA_RECORD["built"] else f"left out: {CUDA_RECORD['reason']}"
        print(f"infopro_fast: CUDA kernels {outcome}", flush=True)
        super().run()
        for root in {self.build_lib, *([ROOT] if self.inplace else [])}:
            folder = os.path.join(root, "infopro_fast")
            if not CUDA_RECORD["built"]:  # remove an earlier build's
                for stale in glob.glob(os.path.join(folder, "_cuda*.so")):
                    os.remove(stale)
            with open(os.path.join(folder, "_build.json"), "w") as file:
                json.dump(record, file, indent=1)


def _limit_jobs():
    """Unless MAX_JOBS is set, run a compiler on each core, as long as each has 2 GiB of memory."""
    with open("/proc/meminfo") as file:
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", file.read())[1]) // 2**21
    os.environ.setdefault("MAX_JOBS", str(max(1, min(len(os.sched_getaffinity(0)), free))))
    try:
        # It is not on PATH if the environment is not activated. Without it torch compiles one file at a time.
        import ninja
    except ModuleNotFoundError:
        return
    os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", os.defpath)


EXTENSIONS, CUDA_RECORD = extensions()
setuptools.setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
