#!/usr/bin/env bash
# Everything about the GPU kernels, in one command on a machine with a GPU and without a network:
#
#     benchmarks/gpu.sh
#
# Builds the package where it is (with the torch, setuptools and ninja that are installed), runs the tests that need a GPU, checks the
# CUDA C++ kernels with compute-sanitizer where there is one, and measures every op and the whole step. Results, with device and
# versions, go to benchmarks/results/<gpu>/. Takes less than 9 minutes. Environment: PYTHON (default: python3), SECONDS_FOR_TESTS (120),
# SECONDS_FOR_BENCHMARKS (280), MAX_JOBS.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
failed=0
step() { printf '\n== %s (%d min %02d s)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
check() { # name, seconds, command...: runs it, and goes on whatever comes
    local name=$1 limit=$2
    shift 2
    step "$name"
    timeout --signal=INT --kill-after=10 "$limit" "$@"
    local status=$?
    [[ $status == 0 ]] || { failed=1; echo "-- $name: exit status $status"; }
}

"$python" - <<'END' || exit 2
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no CUDA device")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}")
END
arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')

# For this GPU alone: a sixth of the time.
check "build" 240 env TORCH_CUDA_ARCH_LIST="$arch" "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
"$python" - <<'END'
from infopro_fast import ops
for op in ops.OPS:
    print(op, ops.available(op, "cuda"))
END

if "$python" -c 'import pytest' 2>/dev/null; then
    check "tests" "${SECONDS_FOR_TESTS:-120}" "$python" -m pytest -q -x -p no:cacheprovider --noconftest -o addopts= tests/test_cuda.py
else
    echo "-- pytest is not installed: the tests are left out, errors are in the results' column"
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [[ $sanitizer ]]; then
    for tool in memcheck racecheck; do
        check "compute-sanitizer $tool" 45 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m benchmarks.cuda_smoke
    done
else
    echo "-- no compute-sanitizer on this machine"
fi
check "benchmarks" $((${SECONDS_FOR_BENCHMARKS:-280} + 20)) "$python" -m benchmarks.gpu --seconds "${SECONDS_FOR_BENCHMARKS:-280}"
step "done"
exit $failed
