"""Load one wheel under several versions of torch, and check every op there.

    python -m tests.one_wheel WHEEL PYTHON [PYTHON ...]
 WHEEL is a wheel of this package (``python -m build --wheel``), each PYTHON an interpreter that has torch but
not this package. The wheel is installed once, into a temporary folder, with ``pip install --no-deps
--target``. There every interpreter runs each op's cases of `op_cases`: the CPU kernels against the reference,
both against plain torch in float64, forward and backward. A table tells the largest difference between the
two in float32, relative to the reference; the exit status is 1 where a case fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main(wheel: str, pythons: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        options = ["-q", "--no-deps", "--no-index", "--target", folder]
        subprocess.run([pythons[0], "-m", "pip", "install", *options, wheel], check=True)
        os.symlink(Path(__file__).resolve().parent, f"{folder}/tests")
        # From that folder, so that its package is the one imported, and no other.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = ["-m", "tests.one_wheel", "--check"]
        columns = []
        for python in pythons:
            call = [os.path.abspath(python), *command]
            ran = subprocess.run(call, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
            if ran.returncode:
                print(f"one_wheel: {python}: ended with status {ran.returncode}", file=sys.stderr)
                return 1
            columns.append(json.loads(ran.stdout.splitlines()[-1]))
    return tell(wheel, columns)


def tell(wheel: str, columns: list[dict]) -> int:
    """Print the table; return the exit status."""
    name = os.path.basename(wheel)
    print(f"{name}: largest difference of the CPU kernels from the reference, forward / backward")
    print(f"{'':<28}" + "".join(f"{'torch ' + column['torch']:<22}" for column in columns))
    for form in columns[0]["forms"]:
        print(f"{form:<28}" + "".join(f"{cell(column['forms'][form]):<22}" for column in columns))
    status = 0
    for column in columns:
        for form, found in column["forms"].items():
            if found["error"]:
                print(f"torch {column['torch']}: {form}: {found['error']}")
                status = 1
    return status


def cell(found: dict) -> str:
    return "FAILED" if found["error"] else f"{found['forward']:.1e} / {found['backward']:.1e}"


def check() -> None:
    """Print what this interpreter finds, as a line of JSON."""
    import torch

    import infopro_fast
    from infopro_fast.ops import dispatch
    from tests import op_cases

    if Path(infopro_fast.__file__).parent.parent != Path.cwd() or (reason := dispatch.load_cpu_kernels()):
        sys.exit(f"expected the wheel's package and kernels, got {infopro_fast.__file__}: {reason}")
    forms = {}
    for form, make in op_cases.FORMS.items():
        forms[form] = {"error": None, **differences(make())}
        try:
            for impl in ("reference", "cpu"):
                for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                    op_cases.check(make(), impl, dtype)
        except Exception as error:
            forms[form]["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps({"torch": torch.__version__, "forms": forms}))


def differences(case) -> dict[str, float]:
    """Largest difference of the CPU kernels from the reference in float32, relative to its largest number."""
    import torch

    from tests import op_cases

    results = []
    for impl in ("reference", "cpu"):
        inputs = case.inputs(torch.float32)
        result = case.function(impl)(inputs)
        grads = op_cases.gradients(result, inputs)
        for name in case.zero:  # noise around 0
            grads.pop(name, None)
        results.append((result.detach(), grads))
    (result, grads), (found, found_grads) = results
    relative = lambda a, b: ((a - b).abs().max() / b.abs().max()).item()  # noqa: E731
    return {
        "forward": relative(found, result),
        "backward": max(relative(found_grads[name], grad) for name, grad in grads.items()),
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    elif len(sys.argv) < 3:
        sys.exit(__doc__)
    else:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
