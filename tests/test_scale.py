"""Predicted throughput: the timelines on numbers worked out by hand, and the command."""

import json

import pytest

from benchmarks import scale_validation
from infopro_fast import build, cli
from infopro_fast.memory import scale
from infopro_fast.memory.scale import Cluster, Link, Network, Work

FAST = Link(1e30, 0.0)
SLOW = Link(1.0, 0.5)  # a byte a second


def test_link():
    assert SLOW.send(3) == 3.5
    assert SLOW.all_reduce(8, 4) == 2 * 3 * (2 + 0.5)
    assert SLOW.all_reduce(8, 1) == 0


def test_reductions_go_on_beside_the_next_module():
    modules = [Work(10, 4, 0), Work(10, 2, 0)]
    # Two processes: 2 (4 / 2 + .5) = 5 s from 10 on, beside the second module; 2 (1 + .5) = 3 s after it.
    assert scale.local_step_seconds(modules, 2, SLOW) == 23
    # The first one's takes longer than the second module computes: 2 (15 + .5) = 31 from 10 on, then 3.
    assert scale.local_step_seconds([Work(10, 30, 0), Work(10, 2, 0)], 2, SLOW) == 44
    # The third module begins when the first one's gradients are there, after the second has computed.
    assert scale.local_step_seconds([Work(10, 30, 0), Work(10, 2, 0), Work(10, 0, 0)], 2, SLOW) == 51 + 1
    assert scale.local_step_seconds(modules, 1, SLOW) == 20


def test_ddp_reduces_full_buckets_beside_the_backward():
    bucket = scale.BUCKET
    blocks = [Work(3, 1, 0), Work(6, bucket, 0)]
    link = Link(bucket, 0.0)  # a bucket a second
    # Forward 3; backward of the second block 4, whose bucket takes 2 (1 / 2) = 1 beside the first block's
    # backward, 2; then 1 byte.
    assert scale.ddp_seconds(blocks, 2, link) == pytest.approx(9, abs=1e-6)


def net(seconds=(4, 4, 4, 4), output=0):
    works = tuple(Work(s, 8, output) for s in seconds)
    return Network("n", 16, works, works, 0)


def test_a_pipeline_of_local_modules_has_no_bubble():
    cluster = Cluster(8, FAST, FAST)
    for stages, seconds in ((1, 16), (2, 8), (4, 4)):
        assert scale.local_pipeline_seconds(net(), stages, 1, cluster) == pytest.approx(seconds)
    assert scale.local_pipeline_seconds(net((1, 1, 6, 2)), 2, 1, cluster) == pytest.approx(8)
    # A wire that takes longer than a stage computes: 20 bytes and the latency.
    assert scale.local_pipeline_seconds(net(output=20), 4, 1, Cluster(8, SLOW, SLOW)) == 20.5


def test_bubble_of_pipelines_with_backward():
    cluster = Cluster(8, FAST, FAST)
    # 4 stages of 4 s in 8 micro-batches: (8 + 3) 4 / 8.
    assert scale.plain_pipeline_seconds(net(), 4, 1, cluster, 8) == pytest.approx(5.5)


def test_the_slow_links_are_between_machines():
    cluster = Cluster(2, FAST, SLOW)
    assert cluster.link(2) is FAST and cluster.link(3) is SLOW


def test_layouts():
    found = {
        (p.layout, p.gpus): p
        for gpus in (1, 2, 8)
        for p in scale.predict(net(), gpus, Cluster(8, FAST, FAST), 8)
    }
    for layout in ("data", "mixed"):
        assert found[layout, 1].images_per_second == 1 and found[
            layout, 8
        ].images_per_second == pytest.approx(8)
    assert (
        found["pipeline", 2].images_per_second == pytest.approx(2) and ("pipeline", 8) not in found
    )  # there are 4 modules
    assert found["GPipe/1F1B, end to end", 2].images_per_second == pytest.approx(2 * 8 / 9)
    # Links so slow that only fewer replicas pay: the modules' gradients are 32 bytes of a byte a second.
    slow = {p.layout: p for p in scale.predict(net(), 4, Cluster(8, SLOW, SLOW), 8)}
    assert slow["mixed"].stages == 4 and slow["mixed"].images_per_second > slow["data"].images_per_second


def test_four_processes_on_two_cores():
    """The benchmark's prediction for this machine: all cores share the work, and make the copies."""
    link, layouts = (
        Link(8, 0.5),
        {(one.name, one.processes): one for one in scale_validation.layouts(net((4, 4, 6, 4)))},
    )
    quick = {
        key: scale_validation.predicted(layout, net((4, 4, 6, 4)), FAST, 2) for key, layout in layouts.items()
    }
    assert layouts["mixed", 4].replicas == 2 and layouts["mixed", 4].pipeline == (2, 2)
    # A batch of 16 images is 18 s of work, which two cores do in 9; the slower one of two stages has 10 of
    # them, that of four 6.
    for layout, seconds in {
        ("data", 2): 9,
        ("pipeline", 2): 10,
        ("data", 4): 9,
        ("pipeline", 4): 9,
        ("mixed", 4): 9,
    }.items():
        assert quick[layout] == pytest.approx(16 / seconds), layout
    # Gradients of 8 bytes: 2 (4 / 8 + 0.5) = 2 s a module between two processes; features and what is carried
    # 0.5 s at both ends.
    copies = scale_validation.copying(layouts["mixed", 4], net((4, 4, 6, 4)), link)
    assert [work.seconds for work in copies] == [6, 6.5, 8.5, 6]
    copies = scale_validation.copying(layouts["pipeline", 4], net((4, 4, 6, 4), output=8), link)
    assert [work.seconds for work in copies] == [5.5, 7, 9, 5.5]


def test_command(tmp_path, capsys):
    words = [
        "scale",
        "--arch",
        "resnet20",
        "--modules",
        "3",
        "--batch-size",
        "2",
        "--gpus",
        "1",
        "4",
        "--out",
        str(tmp_path / "s.png"),
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    out = capsys.readouterr()
    assert stop.value.code == 0, out.err
    assert "resnet20, 3 modules, batch 2 a replica, images/s" in out.out
    assert (tmp_path / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (network,) = json.loads((tmp_path / "s.json").read_text())["networks"]
    assert len(network["network"]["local"]) == 3 and network["network"]["carried"] == 2 * (
        3 * 32 * 32 * 4 + 8
    )
    assert [work["output"] for work in network["network"]["local"]][-1] == 2 * 64 * 8 * 8 * 4
    assert len(build("resnet20", 3, cuts=[tuple(cut) for cut in network["network"]["cuts"]]).stages) == 3
    assert {p["gpus"] for p in network["predictions"]} == {1, 4}


def test_errors(capsys, monkeypatch):
    """Before anything is timed."""
    measure = scale.measure_chain
    monkeypatch.setattr(
        scale, "measure_chain", lambda *given, timed=False: pytest.fail("timed") if timed else measure(*given)
    )
    few, uneven = "gpus: expected numbers of at least 1", "modules: expected one number"
    for words, message in (
        (["--gpus", "0"], few), (["--modules", "2", "3"], uneven),
        (["--threads", "0"], "threads: expected numbers of at least 1, got 0"),
        (["--modules", "0"], "modules: expected numbers of at least 1, got 0"),
        (["--modules", "11"], "modules: expected 1 to 10 for resnet20, got 11"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["scale", "--arch", "resnet20", *words])
        assert stop.value.code == 2 and message in capsys.readouterr().err
