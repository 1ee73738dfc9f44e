"""`infopro-fast info --check`: right here, and told of kernels that are not."""

from __future__ import annotations

import pytest
import torch

from infopro_fast import check, cli, ops


@pytest.fixture
def linear(monkeypatch):
    """The cases of one op."""
    found = [case for case in check.cases() if case.op == "linear_cross_entropy"]
    monkeypatch.setattr(check, "cases", lambda: iter(found))


def broken(monkeypatch, name, change):
    """Let ``change`` work on the gradient that the CPU kernels give an argument."""
    op, at = ops.linear_cross_entropy, ("input", "weight").index(name)

    def call(*args, impl, **options):
        if impl == "cpu":
            args = list(args)
            args[at] = args[at] * 1
            args[at].register_hook(change)
        return op(*args, impl=impl, **options)

    monkeypatch.setattr(ops, "linear_cross_entropy", call)


def run(capsys) -> tuple[int, list[str], str]:
    """Return the exit code, the rows of the CPU kernels, and stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "--check"])
    shown = capsys.readouterr()
    return stop.value.code, [line for line in shown.out.splitlines() if " cpu on cpu " in line], shown.err


def test_every_op_and_implementation_is_right(capsys, cpu):
    code, rows, err = run(capsys)
    assert code == 0 and not err
    for op in ops.OPS:
        own = [row for row in rows if row.startswith(op + " ")]
        assert len(own) >= 4 and all(row.endswith("  ok") for row in own), own
        assert {"float32", "bfloat16"} <= {word for row in own for word in row.split()}


def test_a_wrong_gradient_is_told(monkeypatch, capsys, linear, cpu):
    broken(monkeypatch, "weight", lambda grad: 1.001 * grad)
    code, rows, err = run(capsys)
    assert code == 1 and "info --check: 4 of 16 rows are wrong" in err
    assert all(row.endswith("gradient of weight is wrong") == ("float32" in row) for row in rows)


def test_nan_is_wrong(monkeypatch, capsys, linear, cpu):
    broken(monkeypatch, "input", lambda grad: grad * torch.nan)
    code, rows, _ = run(capsys)
    assert code == 1 and all(row.endswith("gradient of input is wrong") for row in rows)


def test_other_bits_are_told(monkeypatch, capsys, linear, cpu):
    broken(monkeypatch, "weight", lambda grad: grad + 1e-8 * torch.rand(grad.shape))
    code, rows, _ = run(capsys)
    assert code == 1 and all(row.endswith("other bits the second time") for row in rows if "float32" in row)


def test_an_op_that_raises_is_told(monkeypatch, capsys, linear, cpu):
    def fail(grad):
        raise RuntimeError("no such kernel\nsecond line")

    broken(monkeypatch, "input", fail)
    code, rows, _ = run(capsys)
    assert code == 1 and all(row.endswith("RuntimeError: no such kernel") for row in rows)
