"""A process dies, stalls, or has no memory or disk left: all stop with one message; the run continues."""

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch.distributed as dist

from infopro_fast import whole_files
from infopro_fast.trainer import checkpoint, run_folder
from infopro_fast.trainer.processes import watch
from infopro_fast.trainer.processes.watch import cause_of, is_of_communication
from tests.process_faults import FULL
from tests.test_distributed import ROOT, drive, lines, same

pytestmark = pytest.mark.xdist_group("faults")

PIPELINE = {0: r"rank 0 \(module 1 of 3\)", 1: r"rank 1 \(modules 2-3 of 3\)"}
WHO = {
    "data": {rank: f"rank {rank}" for rank in range(2)},
    "pipeline": PIPELINE,
    "three": {rank: rf"rank {rank} \(module {rank + 1} of 3\)" for rank in range(3)},
    "mixed": {
        rank: rf"rank {rank} \({('modules 2-3' if rank % 2 else 'module 1')} of 3\)" for rank in range(4)
    },
}
CAUSES = {
    "killed": r"killed \(process \d+ is gone\)",
    "stopped": r"stalled \(process \d+ is stopped\)",
    "stands_still": r"in module 1, epoch 2, step 2 of 4: stalled \(no progress for [4-9] s\)",
    "out_of_memory": r"in module \d, epoch 2, step 2 of 4: out of memory",
    "not_finite": r"module \d, reconstruction loss: nan; training stopped, the last checkpoint before it, "
    ".*epoch0001-batch000000, is kept",
    "disk_full": r"writing a checkpoint, .*: OSError: .*File too large",
}
CASES = [
    "data-killed-0", "data-killed-1", "pipeline-killed-0", "pipeline-killed-1", "data-stopped-1",
    "pipeline-stopped-1", "data-stands_still-0", "pipeline-stands_still-0", "data-out_of_memory-1",
    "pipeline-out_of_memory-0", "data-not_finite-0", "pipeline-not_finite-1", "data-disk_full-0",
    "pipeline-disk_full-1",
]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("faults"), "faults")["faults"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_all_stop_with_one_message(faults, case):
    assert_all_stop_with_one_message(faults[case], case)


def assert_all_stop_with_one_message(found, case):
    """Within 30 s, all that can; the message names rank, modules and cause, and how to continue."""
    mode, fault, rank = case.split("-")
    codes = found["codes"]
    for own in map(str, WHO[mode]):
        expected = {"killed": -9, "stopped": None}.get(fault, 1) if own == rank else 1
        assert codes.get(own) == expected, found["errors"]
    said = [
        line for text in found["errors"] for line in text.splitlines() if line.startswith("infopro-fast:")
    ]
    assert len(said) == 1, found["errors"]
    who = WHO[mode][int(rank)]
    if fault == "not_finite":  # whoever sees the losses
        who = r"rank [01]( \(modules? [-0-9]+ of 3\))?"
    advice = f"all processes stop; continue with --resume {found['run']}"
    pattern = rf"infopro-fast: error: {who}, .*{CAUSES[fault]}.*; {advice}$"
    assert re.search(pattern, said[0]), said[0]
    assert "Traceback" not in "".join(found["errors"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_no_checkpoint_is_lost(faults, case):
    assert_no_checkpoint_is_lost(faults[case])


def assert_no_checkpoint_is_lost(found):
    """What was saved before the fault, a full disk too, is there and whole; no half of a new one."""
    assert found["checkpoints"] == ["epoch0000-batch000000", "epoch0001-batch000000"]
    run = Path(found["run"])
    assert [path.name for path in run.rglob(whole_files.ASIDE + "*")] == []


@pytest.mark.parametrize("case, main", [("data-terminated-1", 0), ("pipeline-terminated-0", 1)])
@pytest.mark.slow
def test_a_signal_stops_all_after_the_same_step(faults, case, main):
    """With a checkpoint of it, and the message of a run of one process, from the main process."""
    found = faults[case]
    assert found["codes"] == {str(main): 143, str(1 - main): 0}, found["errors"]
    assert found["checkpoints"][-1] == "epoch0001-batch000003"
    assert (
        found["errors"][main].strip()
        == f"infopro-fast: stopped by SIGTERM; continue with: infopro-fast train --resume {found['run']}"
    )
    assert found["errors"][1 - main] == ""


@pytest.mark.parametrize("case", [*CASES, "data-terminated-1", "pipeline-terminated-0"])
@pytest.mark.slow
def test_continues_to_the_same_bits(faults, case):
    """As many processes as before, and of pipelines others too: three, or one without torchrun."""
    found = faults[case]
    assert set(found["again"]["codes"]) == {0} and not any(found["again"]["errors"]), found["again"]
    alone, run = Path(faults[case.partition("-")[0]]["run"]), Path(found["run"])
    if case == "data-stands_still-0":  # one process has other batch norms than two
        assert checkpoint.load(run / "checkpoints" / checkpoint.name_of(3, 0))["epoch"] == 3
        return
    assert_same_end(run, alone)


def assert_same_end(run, alone):
    """The bits of a run that was left alone: weights, optimizers, metrics."""
    name = checkpoint.name_of(3, 0)
    expected, got = (checkpoint.load(path / "checkpoints" / name) for path in (alone, run))
    assert got["epoch"] == 3
    for part in ("net", "trainer", "meters", "best", "test"):
        assert same(got[part], expected[part]), part
    assert lines(run) == lines(alone)
    assert same(*(safetensors.torch.load_file(path / run_folder.WEIGHTS) for path in (alone, run)))


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("kills"), "kills")["kills"]


KILLED = [f"{mode}-killed-{rank}" for mode in ("three", "mixed") for rank in WHO[mode]]


@pytest.mark.parametrize("case", KILLED)
@pytest.mark.slow
def test_any_process_of_a_larger_layout_is_killed(kills, case):
    """In a pipeline of three, and in two pipelines of two that share the batches."""
    assert_all_stop_with_one_message(kills[case], case)
    assert_no_checkpoint_is_lost(kills[case])
    again = kills[case]["again"]
    assert set(again["codes"]) == {0} and not any(again["errors"]), again
    assert_same_end(Path(kills[case]["run"]), Path(kills[case.partition("-")[0]]["run"]))


@functools.cache
def own_mounts() -> tuple[str, ...]:
    """A command in front of another one, which may then mount; () where this machine does not let us."""
    for words in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
            mount = [*words, "mount", "-t", "tmpfs", "tmpfs", folder]
            if subprocess.run(mount, capture_output=True).returncode == 0:
                return words
    return ()


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory):
    if not own_mounts():
        pytest.skip(
            "a full disk needs a mount, which unshare --mount is not allowed here; "
            "the faults above limit the size of a file"
        )
    return drive(tmp_path_factory.mktemp("full"), "full_disk", prefix=own_mounts())["full_disk"]


@pytest.mark.parametrize("mode", FULL)
@pytest.mark.slow
def test_full_disk(full_disk, mode):
    """On a real full disk, nothing saved is lost; with room again, the run ends with the same bits."""
    found = full_disk[mode]
    said = [line for text in found["errors"] for line in text.splitlines()]
    assert set(found["codes"]) == {1} and len(said) == 1, found["errors"]
    file = (
        "cache/module001/epoch0001.bin"
        if mode == "cache"
        else "checkpoints/.aside-epoch0002-batch000000/tensors.safetensors"
    )
    assert f"[Errno 28] No space left on device: '{found['run']}/{file}'" in said[0]
    if mode in WHO:
        who = WHO[mode][FULL[mode][2]]
        assert re.match(
            rf"infopro-fast: error: {who}, writing a checkpoint, .*; all processes stop; continue with --",
            said[0],
        )
    assert found["aside"] == []
    assert set(found["again"]["codes"]) == {0} and not any(found["again"]["errors"]), found["again"]
    if mode == "cache":
        assert found["trained"] == ["module001"]
        run, alone = Path(found["kept"]), Path(full_disk["cache-undisturbed"]["run"])
        assert lines(run) == lines(alone) and same(
            *(safetensors.torch.load_file(path / run_folder.WEIGHTS) for path in (alone, run))
        )
        return
    assert found["checkpoints"] == ["epoch0000-batch000000", "epoch0001-batch000000"]
    assert_same_end(
        Path(found["kept"]), Path(full_disk["data-undisturbed" if mode == "data" else "undisturbed"]["run"])
    )


@pytest.mark.parametrize("mode", ["data", "pipeline"])
@pytest.mark.slow
def test_torchrun_restarts(faults, tmp_path, mode):
    """torchrun --max-restarts brings the run to the same end by itself, one of its processes being killed."""
    rank = {"data": 0, "pipeline": 1}[mode]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "1", "-m", "tests.restarted", str(tmp_path / "run"), mode, str(rank),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("infopro-fast: error") == 1 and f"continuing {tmp_path / 'run'} from" in done.stdout
    ), done.stderr
    last = Path("checkpoints") / checkpoint.name_of(3, 0)
    expected, got = (checkpoint.load(Path(run) / last) for run in (faults[mode]["run"], tmp_path / "run"))
    for part in ("net", "trainer", "meters", "best", "test"):
        assert same(got[part], expected[part]), part


def test_causes():
    assert cause_of(
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried")
    ).startswith("out of memory (")
    assert cause_of(ValueError("one\ntwo")) == "ValueError: one"
    assert is_of_communication(
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    )
    assert not is_of_communication(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_failure_is_said_by_the_thread_that_met_it(monkeypatch):
    """A failure is reported by the thread that met it, also if the main thread never leaves."""
    ended = []
    monkeypatch.setattr(watch, "TICK", 0.02)
    monkeypatch.setattr(watch, "end_process", ended.append)
    one = watch.Watch(dist.HashStore(), 0, 1, "rank 0", lambda: "no run was begun", 4)
    one.start()
    message = one.fail("ValueError: no")
    assert message == "rank 0, at the start: ValueError: no; it stops; no run was begun"
    time.sleep(10 * watch.TICK)
    assert ended == []
    end = time.monotonic() + 20
    while not ended and time.monotonic() < end:
        time.sleep(watch.TICK)
    assert ended == [message]


def test_a_failure_of_another_process_ends_this_one_without_a_word(monkeypatch):
    ended, there = [], threading.Event()
    monkeypatch.setattr(watch, "TICK", 0.02)
    monkeypatch.setattr(watch, "end_process", lambda message: (ended.append(message), there.set()))
    store = dist.HashStore()
    one, other = (watch.Watch(store, rank, 2, f"rank {rank}", lambda: "", 4) for rank in range(2))
    other.look(0)
    one.start()
    assert other.fail("killed") is not None
    assert there.wait(20) and set(ended) == {""}
    assert one.fail("also") is None
    one.close()
