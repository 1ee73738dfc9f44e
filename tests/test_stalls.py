"""Processes that stall outside the modules' steps are found as soon as others; slow ones are left alone."""

import os
import re
from pathlib import Path

import pytest
import torch

from infopro_fast import whole_files
from infopro_fast.trainer import loop, run_folder, setup
from infopro_fast.trainer.processes import linux, watch
from infopro_fast.trainer.processes.connect import Processes
from infopro_fast.trainer.processes.layout import Layout
from infopro_fast.trainer.processes.wire import Packet
from infopro_fast.trainer.share import Share
from tests import tiny_run
from tests.process_faults import DEFAULT_PATIENCE, STALLS
from tests.test_distributed import drive

pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytestmark = pytest.mark.xdist_group("stalls")

LAST = r"rank 1 \(modules 2-3 of 3\)"
PLACES = {
    "reader": "rank 1, reading images, epoch 1, step [01] of 2",
    "evaluation": "rank 0, in evaluation, epoch 2, step 4 of 4",
    "evaluation_of_first_stage": r"rank 0 \(module 1 of 3\), in evaluation, epoch 2, step 4 of 4",
    "disk": "rank 0, writing a checkpoint, epoch 3, step 0 of 4",
    "disk_of_last_stage": f"{LAST}, writing a checkpoint, epoch 3, step 0 of 4",
    "output": f"{LAST}, between two epochs, epoch 2, step 4 of 4",
    "cache": "this process, caching the outputs of module 1, epoch 2",
}


@pytest.fixture(scope="module")
def stalls(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("stalls"), "stalls")["stalls"]


@pytest.mark.parametrize("name", STALLS)
@pytest.mark.slow
def test_all_stop_and_say_where(stalls, name):
    """Within 30 s of the stall with the default patience; one message, and nothing is left running."""
    found = stalls[name]
    assert set(found["codes"]) == {1}, found
    (said,) = [
        line for text in found["errors"] for line in text.splitlines() if line.startswith("infopro-fast:")
    ]
    least, most = (20, 27) if name == DEFAULT_PATIENCE else (4, 11)
    seconds = re.search(rf"infopro-fast: error: {PLACES[name]}: stalled \(no progress for (\d+) s\); ", said)
    assert seconds and least <= int(seconds[1]) <= most, said
    stop = "all processes stop" if STALLS[name][2] else "it stops"
    assert said.endswith(f"; {stop}; continue with --resume {found['run']}")
    assert found["seconds"] < 30, found
    assert "Traceback" not in "".join(found["errors"])


@pytest.mark.parametrize("name", ["disk_of_last_stage", "cache"])
@pytest.mark.slow
def test_continues(stalls, name):
    again = stalls[name]["again"]
    assert set(again["codes"]) == {0} and not any(again["errors"]), again
    assert (Path(stalls[name]["run"]) / run_folder.WEIGHTS).is_file()


@pytest.mark.slow
def test_slow_work_is_left_alone(stalls):
    """Batches, evaluations and checkpoints that take longer than the patience, each by many short pieces."""
    found = stalls["slow"]
    assert found["codes"] == [0, 0] and not any(found["errors"]), found
    assert (Path(found["run"]) / run_folder.WEIGHTS).is_file()


@pytest.mark.skipif(
    not os.path.exists("/proc/self/schedstat"),
    reason="this system does not count how long threads wait for a CPU",
)
@pytest.mark.slow
def test_a_process_that_gets_no_cpu_does_not_stand_still(tmp_path):
    """Eight times its patience; one that does nothing does."""
    found = drive(tmp_path, "starved")["starved"]
    assert found["codes"] == [0], found["errors"]
    assert found["while_starved"] == []
    (said,) = set(found["while_standing"])
    assert said.startswith("this process, in another step: stalled (no progress for ")


@pytest.mark.parametrize(
    "ran, waited, wants, expected",
    [
        (0.0, 0.0, "no", False),  # it sleeps
        (0.9, 0.05, "yes", False),  # it computes
        (0.1, 0.8, "no", True),  # it had to wait, and sleeps again
        (0.0, 0.0, "yes", True),  # it waits, and has not been let yet
        (0.0, 0.0, "now", False),  # it just woke up
    ],
)
def test_whether_a_thread_is_starved(monkeypatch, ran, waited, wants, expected):
    """From what the system says of it, a second apart."""
    looks = iter(
        [linux.Thread(5.0, 3.0, wants == "yes"), linux.Thread(5.0 + ran, 3.0 + waited, wants != "no")]
    )
    times = iter([100.0, 101.0])
    monkeypatch.setattr(linux, "threads", lambda: {"7": next(looks)})
    monkeypatch.setattr(linux.time, "monotonic", lambda: next(times))
    starved = linux.Starved()
    found = starved()
    monkeypatch.undo()
    assert found is expected


def test_large_files_are_written_in_pieces(tmp_path, monkeypatch):
    """Each of which is on the disk before the next, and told."""
    monkeypatch.setattr(whole_files, "PIECE", 10)
    fsync, sizes, moves = os.fsync, [], []
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), fsync(file)))
    content = bytes(range(34))
    whole_files.write_file(tmp_path / "file", content, lambda: moves.append(len(sizes)))
    assert (tmp_path / "file").read_bytes() == content
    assert sizes == [10, 20, 30, 34] and moves == [1, 2, 3, 4]


def test_a_pulse_is_a_move(monkeypatch):
    """A pulse belongs to its own place alone."""
    one, pulse = watch.Watch(watch.dist.HashStore(), 0, 1, "rank 0", lambda: "", 4), [0]
    one.at("reading images", pulse=lambda: pulse[0])
    for tick in range(20):
        pulse[0] += 1
        assert one.look(tick) is None
    one.at("in a step")
    found = []
    for tick in range(20, 26):
        pulse[0] += 1
        found.append(one.look(tick))
    assert found[:4] == [None] * 4 and found[4].startswith("rank 0, in a step: stalled (no progress for 4 s)")


def test_the_first_step_of_a_shape_is_given_longer_on_a_gpu(tmp_path):
    """It compiles kernels: for each shape of batch and of part of a batch, in a step and in an evaluation."""

    class Seen(watch.Unwatched):
        def __init__(self):
            self.places = []

        def at(self, place, *, slow=False, pulse=None):
            self.places.append((place.partition(",")[0], slow))

    def seen(device: str) -> list[tuple[str, bool]]:
        config, images = tiny_run.config(tmp_path).resolved(), tiny_run.load()
        net, here = setup.build(config, images), Processes(Layout.alone(config))
        training = loop.Training(config, tmp_path, images, Share(config, images, net, here))
        training.device, training.watch = torch.device(device), Seen()
        step = "in a step", (8, 8, 3)
        for working, counts in (step, ("in evaluation", (8, 3)), step):
            batches = [(torch.empty(n, 3, 4, 4), torch.empty(n)) for n in counts]
            packets = [Packet(image, image, label) for image, label in batches]
            for packet in training.told(iter(packets), "reading", working):
                for part in packet.image.chunk(2):
                    training.at("in module 1", len(part))
        return [(place, slow) for place, slow in training.watch.places if place != "reading"]

    expected = [
        ("in a step", True), ("in module 1", True), ("in module 1", False),
        ("in a step", False), ("in module 1", False), ("in module 1", False),
        ("in a step", True), ("in module 1", True), ("in module 1", True),
        ("in evaluation", True), ("in module 1", False), ("in module 1", False),
        ("in evaluation", True), ("in module 1", False), ("in module 1", False),
        *[("in a step", False), ("in module 1", False), ("in module 1", False)] * 3,
    ]
    assert seen("cuda") == expected
    assert seen("cpu") == [(place, False) for place, _ in expected]
