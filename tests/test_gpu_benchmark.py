"""The report of a GPU without one: the order of measurements, the claims and when they count, the files."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks import cuda_smoke, shapes, train_step, workloads
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import claims, files
from benchmarks.gpu.meter import Budget, Meter
from benchmarks.table import Row
from tests.conftest import need_cpu_kernels

COMPILED_METHODS = (
    "compile",
    "compile channels_last",
    "compile max-autotune",
    "released compile",
    "released compile max-autotune",
)


def rows_of_the_claims() -> list[Row]:
    """What the parts of the claims would measure, every method taking a second and a byte."""
    found = []
    for i, (op, shape) in enumerate(gpu.claimed_ops(small=False)):
        methods = [m for m in gpu.METHODS[op] if "compile" not in m or i == 0]  # as `parts` has it
        of_it = dict(op=op, shape=workloads.label(shape), seconds=1.0, multiple=1.0, peak_bytes=1)
        found += [Row(method=m, **of_it) for m in methods]
    for case in gpu.claimed_steps(small=False) + gpu.claimed_compiled_steps(small=False):
        found += [Row("step", case.label, m, "step", seconds=1.0, peak_bytes=1) for m in case.methods]
    return found


def values(results: list[Row]) -> list[float | None]:
    return [c.value for c in claims.claims(results)]


# ------------------------------------------------------------------------------------------------------------
# Claims


def test_the_first_parts_measure_all_that_the_claims_need():
    assert None not in values(rows_of_the_claims())
    what = [part.what for part in gpu.parts(Meter("cpu"), small=False)]
    claimed = [i for i, name in enumerate(what) if "of the claims" in name]
    assert claimed == list(range(len(claimed))), what


@pytest.mark.parametrize("arch, K, N, method", [
    ("resnet32", 1, 1024, "compile"), ("resnet32", 1, 1024, train_step.GRAPH),
    ("resnet32", 1, 1024, "released channels_last"), ("resnet32", 1, 1024, "ours"),
    ("resnet32", 16, 128, "released channels_last"), ("resnet32", 16, 128, train_step.GRAPH),
])
def test_no_claim_of_a_step_holds_against_what_is_missing(arch, K, N, method):
    label = claims.step_label(arch, K, N)
    rest = [r for r in rows_of_the_claims() if (r.shape, r.method) != (label, method)]
    lost = [c for c in claims.claims(rest) if c.value is None]
    assert lost and all(f"N {N}" in c.what and c.holds() is None for c in lost)
    assert len(rest) == len(rows_of_the_claims()) - 1


@pytest.mark.parametrize("method", claims.DECODER_BASELINES)
def test_no_claim_of_the_decoder_holds_against_what_is_missing(method):
    rest = [r for r in rows_of_the_claims() if (r.op, r.method) != ("reconstruction_loss", method)]
    lost = [c for c in claims.claims(rest) if c.value is None]
    assert [c.what for c in lost] == ["same, faster than the best of torch.compile and channels_last"]


def test_a_method_that_failed_is_not_a_baseline():
    rows = rows_of_the_claims()
    failed = next(r for r in rows if (r.op, r.method) == ("reconstruction_loss", "compile"))
    failed.seconds, failed.note = None, "out of memory"
    assert values(rows)[1] is None


def set_seconds(rows: list[Row], seconds: dict[tuple[str, str], float]) -> list[Row]:
    for (shape, method), s in seconds.items():
        (row,) = [r for r in rows if (r.shape, r.method) == (shape, method)]
        row.seconds = s
    return rows


def test_the_step_is_compared_with_the_best_end_to_end_and_graph_with_graph():
    sixteen, one = claims.step_label("resnet32", 16, 1024), claims.step_label("resnet32", 1, 1024)
    seconds = {
        (sixteen, "ours"): 9.0, (sixteen, train_step.GRAPH): 6.0, (one, train_step.GRAPH): 5.0,
        (one, "ours"): 8.0, (one, "compile"): 4.0, (one, "released"): 9.0,
        (one, "released channels_last"): 9.0,
    }
    rows = set_seconds(rows_of_the_claims(), seconds)
    graphs, best = claims.claims(rows)[5:7]
    assert graphs.value == 6.0 / 5.0 and graphs.holds() is True
    assert best.value == 6.0 / 4.0 and best.against == "compile" and best.holds() is False


def test_max_autotune_counts_where_it_is_measured():
    label = workloads.label(claims.DECODER)
    rows = set_seconds(rows_of_the_claims(), {(label, workloads.TUNED): 0.5})
    assert claims.claims(rows)[1].value == 0.5 and claims.claims(rows)[1].against == workloads.TUNED
    without = [r for r in rows if r.method != workloads.TUNED]
    assert claims.claims(without)[1].value == 1.0


# ------------------------------------------------------------------------------------------------------------
# What is measured


def test_steps_of_the_claims_come_before_those_that_are_compiled():
    order = [part.what for part in gpu.parts(Meter("cpu"), small=False)]
    assert (
        order.index("steps of the claims")
        < order.index("steps of the claims, compiled")
        < order.index("other steps")
    )
    assert not any(m in COMPILED_METHODS for case in gpu.claimed_steps(small=False) for m in case.methods)
    last = [m for case in gpu.other_steps(small=False) for m in case.methods]
    assert [m in COMPILED_METHODS for m in last[-2:]] == [True, True]
    assert {"checkpoint", "compile max-autotune", "released checkpoint", *COMPILED_METHODS[3:]} <= set(last)


@pytest.mark.parametrize("op", gpu.OPS)
def test_ours_is_measured_first_and_max_autotune_last(op):
    assert (
        gpu.METHODS[op][0] == workloads.OURS
        and gpu.METHODS[op][1] == "eager"
        and gpu.METHODS[op][-1] == workloads.TUNED
    )


def test_no_shape_is_measured_twice_or_left_out():
    from benchmarks import floors

    found = gpu.claimed_ops(small=False) + gpu.other_ops(small=False)
    every = {(op, shape) for op in gpu.OPS for shape in floors.KERNELS[op][2]}
    assert len(found) == len(set(found)) and set(found) == every


@pytest.mark.parametrize("method", ("checkpoint", "released checkpoint"))
def test_a_step_that_checkpoints_trains_as_it_would_without(method, cpu, threads):
    threads(1)
    K = 4 if method.startswith("released") else 1
    losses = {}
    for name in (method, method.replace("checkpoint", "").strip() or "ours"):
        call = train_step.step(name, K, 4)
        found = [call() for _ in range(2)]
        losses[name] = [r if isinstance(r, float) else r["loss"].item() for r in found]
    a, b = losses.values()
    assert a == pytest.approx(b, rel=1e-4) and a[0] != a[1]


@pytest.mark.parametrize("method, K, count, mode", (
    ("compile", 1, 1, None), ("released compile", 4, 4 + 3 + 3, None),
    ("released compile max-autotune", 4, 10, "max-autotune"),
))
def test_compiled_steps_are_compiled_for_their_batch_size(method, K, count, mode, cpu, threads, monkeypatch):
    """Stages, and the authors' decoders and heads; dynamic shapes would change the program."""
    threads(1)
    compiled, begun = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compiled.append(kwargs))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    call = train_step.step(method, K, 2)
    call(), call()
    assert compiled == count * [dict(dynamic=False, mode=mode)]
    assert len(begun) == (2 if mode else 0), "a step's results may be written over by the next's graphs"


def test_peers_that_are_missing_or_broken_are_a_note(tmp_path, monkeypatch):
    (tmp_path / "memeff.py").write_text("raise RuntimeError('made for\\nanother triton')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "memeff", raising=False)
    importlib.invalidate_caches()
    broken = "installed, and does not import: RuntimeError: made for another triton"
    assert workloads.missing("memeff") == broken
    shape = shapes.SupConShape(16)
    found = {
        r.method: r
        for r in gpu.measure_op(
            Meter("cpu"), "supcon_loss", shape, "float32", ("memeff", "eager"), Budget(60), ("both",)
        )
    }
    assert found["memeff"].note == broken and found["memeff"].seconds is None and found["eager"].seconds > 0
    monkeypatch.setitem(workloads.PEERS, "memeff", ("no_such_package_here.of_it", "loss"))
    assert workloads.missing("memeff") == "not installed"


def test_a_peer_with_another_loss_is_measured_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "memeff.py").write_text(
        "import torch\nclass MemoryEfficientCLIPLoss(torch.nn.Module):\n"
        "    def __init__(self, temperature, stable): super().__init__()\n"
        "    def forward(self, x, y): return (x * y).mean()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "memeff", raising=False)
    importlib.invalidate_caches()
    (found,) = gpu.measure_op(
        Meter("cpu"), "supcon_loss", shapes.SupConShape(16), "float32", ("memeff",), Budget(60), ("both",)
    )
    assert found.seconds > 0 and found.error is None and found.note == workloads.OTHER_LOSS["memeff"]
    assert found.note in files.line(found) and " ms" in files.line(found)
    del sys.modules["memeff"]  # monkeypatch would put it back


@pytest.mark.parametrize("most, expected", ((16, [4, 16]), (3, [4])))
def test_batch_sizes_go_on_until_memory_runs_out(most, expected, monkeypatch):
    """Four times as many, and between the last that ran and the first that did not, twice as many."""

    def measure(meter, op, shape, dtype, methods, budget, directions, with_error):
        seconds = None if shape.N > most else 1.0
        return [
            Row(
                op,
                workloads.label(shape),
                methods[0],
                seconds=seconds,
                note="" if seconds else "out of memory",
            )
        ]

    monkeypatch.setattr(gpu, "measure_op", measure)
    found = [
        r
        for rows in gpu.measure_sizes(Meter("cpu"), Budget(60), small=True)
        for r in rows
        if r.method == workloads.OURS
    ]
    assert [int(r.shape.split()[0][1:]) for r in found] == expected and {r.op for r in found} == {
        "batch size"
    }
    most *= 1000
    large = [
        r
        for rows in gpu.measure_sizes(Meter("cpu"), Budget(60), small=False)
        for r in rows
        if r.method == "eager"
    ]
    sizes = [int(r.shape.split()[0][1:]) for r in large]
    assert most // 2 < max(N for N in sizes if N <= most) and any(N > most for N in sizes)


def test_when_the_time_is_over_every_row_says_so():
    ops = [
        r for rows in gpu.measure_ops(Meter("cpu"), Budget(0), gpu.claimed_ops(True), "float32") for r in rows
    ]
    sizes = [r for rows in gpu.measure_sizes(Meter("cpu"), Budget(0), True) for r in rows]
    steps = [
        r for rows in gpu.measure_steps(Meter("cpu"), Budget(0), gpu.claimed_steps(True), 0) for r in rows
    ]
    assert (
        {r.method for r in sizes} == {"ours", "eager", "channels_last", "checkpoint", "compile"}
        and ops
        and steps
    )
    for r in ops + sizes + steps:
        assert r.seconds is None and (r.note == "not measured: out of time" or r.method in workloads.PEERS)


# ------------------------------------------------------------------------------------------------------------
# The whole, on small shapes


@pytest.fixture(scope="module")
def report(request, tmp_path_factory) -> tuple[list[dict], pathlib.Path]:
    """Rows of results.jsonl, and the folder; compiled methods are left out as if there were no time."""
    need_cpu_kernels(request.config)
    folder, before = tmp_path_factory.mktemp("gpu"), torch.get_num_threads()
    torch.set_num_threads(1)  # small shapes
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gpu, "seconds_to_start", lambda method: 1e9 if "compile" in method else -1e9)
        patched.setattr(
            gpu.Meter,
            "medians",
            lambda self, calls, budget: {name: self.seconds(call) for name, call in calls.items()},
        )
        assert gpu.main(["--device", "cpu", "--small", "--seconds", "600", "--out", str(folder)]) == 0
    torch.set_num_threads(before)
    return [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()], folder


@pytest.mark.slow
def test_rows_of_the_claims_come_first(report):
    rows, _ = report
    parts = list(dict.fromkeys(r["op"] for r in rows))
    assert parts[:3] == ["reconstruction_loss", "supcon_loss", "step"] and set(parts) == {
        *gpu.OPS,
        "step",
        "batch size",
    }
    assert next(r for r in rows if r["seconds"])["method"] == workloads.OURS
    steps = [(r["shape"], r["method"]) for r in rows if r["op"] == "step"]
    assert steps[:2] == [("resnet32 K16 N8", "ours"), ("resnet32 K16 N8", "released")]
    first_compiled = next(i for i, r in enumerate(rows) if "compile" in r["method"])
    assert first_compiled > max(i for i, r in enumerate(rows) if (r["shape"], r["method"]) in steps[:3])


def test_what_runs_on_a_cpu_was_measured(report):
    rows, _ = report
    for r in rows:
        left_out = "compile" in r["method"] or r["method"] in (
            *workloads.PEERS,
            workloads.TRITON,
            workloads.CUDA,
        )
        assert (r["seconds"] is not None) == (not left_out), r
        if r["op"] in gpu.OPS and r["direction"] == "both" and r["dtype"] == "float32" and not left_out:
            assert r["error"] < 1e-4, r


@pytest.mark.fast(1)
def test_files_are_written_and_claim_nothing_of_small_shapes(report):
    _, folder = report
    assert {p.name for p in folder.iterdir()} == {"results.jsonl", "results.md", "bars.md", "batch_size.png"}
    bars = (folder / "bars.md").read_text()
    assert bars.count("not measured") == len(claims.claims([])) and "| yes |" not in bars
    assert "host, us" in (folder / "results.md").read_text()


def test_an_interrupt_loses_one_shape_at_most(tmp_path, monkeypatch):
    """As benchmarks/gpu.sh interrupts a report that is late."""

    def interrupted(meter, small):
        def measure(budget):
            yield [Row("step", "first", "ours", "step", seconds=1.0)]
            yield [Row("step", "second", "ours", "step", seconds=2.0)]
            raise KeyboardInterrupt

        return [gpu.Part("steps", 1.0, measure)]

    monkeypatch.setattr(gpu, "parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path)])
    rows = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["shape"] for r in rows] == ["first", "second"]
    assert not list(tmp_path.glob("*.part"))


# ------------------------------------------------------------------------------------------------------------
# For compute-sanitizer


@pytest.mark.parametrize("name", cuda_smoke.cases())
def test_what_the_sanitized_kernels_are_held_against(name):
    """The same comparison passes with float32 in the kernels' place, and fails where a gradient is wrong."""
    case = cuda_smoke.cases()[name]
    assert 0 < cuda_smoke.error(*case, measured=("reference", torch.float32, "cpu")) < 1e-4
    assert cuda_smoke.error(*case, measured=("reference", torch.bfloat16, "cpu")) > 1e-4


# ------------------------------------------------------------------------------------------------------------
# The one command

PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    "-m pip "*) exit "$PIP" ;;
    "setup.py "*) exit "$BUILD" ;;
    "-c import pytest") exit 1 ;;
    "-c import torch; print"*) echo 9.0 ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "compute-sanitizer $*" >> "$CALLS"
"""


@pytest.mark.parametrize("pip, build, status", ((0, 1, 0), (1, 0, 0), (1, 1, 1)))
def test_the_one_command_fails_only_where_neither_build_works(pip, build, status, tmp_path):
    """benchmarks/gpu.sh with a Python and a compute-sanitizer that note how they are called."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    own = dict(
        CALLS=str(calls),
        PIP=str(pip),
        BUILD=str(build),
        PYTHON=str(tmp_path / "python"),
        SECONDS_IN_ALL="100",
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = pathlib.Path(gpu.__file__).parents[1] / "gpu.sh"
    done = subprocess.run(
        ["bash", script], env=os.environ | own | {"PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stdout + done.stderr
    called = calls.read_text().splitlines()
    assert any(c.startswith("setup.py") for c in called) == bool(pip)
    sanitized = [c for c in called if c.startswith("compute-sanitizer")]
    assert len(sanitized) == 2 and all(
        "--kernel-name kernel_substring=infopro " in c and c.endswith("cuda_smoke") for c in sanitized
    )
    (report,) = [c for c in called if c.startswith("-m benchmarks.gpu")]
    assert 60 <= int(report.split()[-1]) <= 80, "what the rest leaves, and a margin"
