#!/usr/bin/env bash
# Everything about the GPU kernels, in one command on a machine with a GPU and without a network:
#
#     benchmarks/gpu.sh
#
# Builds the package where it is, with the installed torch, setuptools and ninja. Runs the tests that need a
# GPU, checks the CUDA C++ kernels with compute-sanitizer where there is one, and measures every op and the
# whole step. Results, with device and versions, go to benchmarks/results/<gpu>/. Takes less than 9 minutes:
# the benchmarks have what the rest leaves.
# Environment: PYTHON (default: python3), SECONDS_IN_ALL (525), SECONDS_FOR_TESTS (150), MAX_JOBS.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
failed=0
end=${SECONDS_IN_ALL:-525}
step() { printf '\n== %s (%d min %02d s)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
check() { # name, seconds, command...: runs it, and goes on whatever comes
    local name=$1 limit=$2 left=$((end - SECONDS))
    shift 2
    step "$name"
    timeout --signal=INT --kill-after=5 $((limit < left ? limit : left > 1 ? left : 1)) "$@"
    local status=$?
    [[ $status == 0 ]] || { failed=1; echo "-- $name: exit status $status"; }
    return $status
}

"$python" - <<'END' || exit 2
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no CUDA device")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", end=", ")
print(f"Python {sys.version.split()[0]}")
END
arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')

# For this GPU alone: a sixth of the time.
export TORCH_CUDA_ARCH_LIST=$arch
check "build" 180 "$python" -m pip install --quiet --no-build-isolation --no-deps --editable . || {
    # the build is all that the rest needs
    check "build, without pip" 120 "$python" setup.py --quiet build_ext --inplace && failed=0
}
check "check" 120 "$python" -m infopro_fast info --check

if "$python" -c 'import pytest' 2>/dev/null; then
    # Most of their time Triton and torch.compile compile, on one core each.
    parallel=()
    "$python" -c 'import xdist' 2>/dev/null && parallel=(-n $(($(nproc) < 8 ? $(nproc) : 8)))
    check "tests" "${SECONDS_FOR_TESTS:-150}" "$python" -m pytest -q --maxfail=30 --tb=short \
        -p no:cacheprovider --noconftest -o addopts= "${parallel[@]}" tests/test_cuda.py
else
    echo "-- pytest is not installed: the tests are left out, errors are in the results' column"
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [[ $sanitizer ]]; then
    for tool in memcheck racecheck; do # this package's kernels alone: torch's own would take the time
        check "compute-sanitizer $tool" 45 "$sanitizer" --tool "$tool" \
            --kernel-name kernel_substring=infopro --error-exitcode 1 "$python" -m benchmarks.cuda_smoke
    done
else
    echo "-- no compute-sanitizer on this machine"
fi
left=$((end - SECONDS))
check "benchmarks" "$left" "$python" -m benchmarks.gpu --seconds $((left > 40 ? left - 20 : 20))
step "done"
exit $failed
