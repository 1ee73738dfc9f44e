"""kill -9 at every delicate moment: the run continues and ends with the bits of a run that was left alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from infopro_fast import whole_files
from infopro_fast.trainer import checkpoint
from tests.kill_driver import MOMENTS

pytestmark = pytest.mark.xdist_group("kill")

KILLED = [moment for moment in MOMENTS if moment != "never"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.kill_driver", str(folder), *MOMENTS]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


def lines(run):
    """The metrics without what depends on the clock and the machine."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "peak_memory_bytes")}
        for r in records
    ]


def final_state(run):
    states = checkpoint.list_checkpoints(run / "checkpoints")
    assert [s.name for s in states][-1] == checkpoint.name_of(3, 0)
    return checkpoint.load(states[-1])


@pytest.mark.parametrize("moment", KILLED)
@pytest.mark.fast(2)
def test_continues_to_the_same_bits(runs, moment):
    folder, codes, errors = runs
    assert codes["never"] == [0] and codes[moment] == [-signal.SIGKILL, 0], errors
    expected, got = (
        safetensors.torch.load_file(folder / run / "weights.safetensors") for run in ("never", moment)
    )
    assert list(expected) == list(got)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    expected, got = final_state(folder / "never"), final_state(folder / moment)
    for part in ("net", "trainer", "meters", "rng", "best", "test", "epoch", "batch"):
        assert same(got[part], expected[part]), part
    assert lines(folder / moment) == lines(folder / "never")
    leftovers = [
        path.name for path in (folder / moment).rglob("*") if path.name.startswith(whole_files.ASIDE)
    ]
    assert leftovers == []
    assert len(checkpoint.list_checkpoints(folder / moment / "checkpoints")) == 2


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_the_run_left_alone_trained(runs):
    """Otherwise the comparison above would say nothing: weights moved in each of the three epochs."""
    folder, _, _ = runs
    records = lines(folder / "never")
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    assert len({r["train"]["module2/contrast"] for r in epochs}) == 3
    assert [(r["epoch"], r["batch"]) for r in records if r["kind"] == "step"] == [
        (e, b) for e in (1, 2, 3) for b in (3, 4)
    ]
