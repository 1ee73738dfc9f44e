"""Runs under attack: damaged weights, another network's init, early kills, races, signals, lost streams."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal

import pytest
import safetensors.torch
import torch

import infopro_fast
from infopro_fast import errors, whole_files
from infopro_fast.errors import ConfigError, RunError
from infopro_fast.trainer import checkpoint, evaluate_run, fit, resume, run_folder, setup, stopping
from infopro_fast.trainer.step import LocalTrainer
from infopro_fast.trainer.stopping import StopRequest
from tests import tiny_run
from tests.tiny_run import assert_same_weights, at_step

pytestmark = pytest.mark.usefixtures("few_images")


# --------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.slow
def test_every_flipped_bit_of_the_weights_is_found(finished, tmp_path):
    """Anywhere in the file; a tool that knows nothing of the hash reads it too."""
    path = tmp_path / run_folder.WEIGHTS
    content = (finished / run_folder.WEIGHTS).read_bytes()
    path.write_bytes(content)
    tensors = run_folder.read_weights(tmp_path)
    assert tensors.keys() == safetensors.torch.load(content).keys()
    header = 8 + int.from_bytes(content[:8], "little")
    name = content.index(run_folder.SUM.encode())
    places = [*range(8), *range(8, header, 97), *range(header, len(content), len(content) // 40)]
    for place in [*places, content.index(b'"about"') + 12, len(content) - 1]:
        if name <= place < name + len(run_folder.SUM):
            continue
        for bit in (1, 16):
            damaged = bytearray(content)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(RunError, match="weights.safetensors is damaged"):
                run_folder.read_weights(tmp_path)
            with pytest.raises(ConfigError, match="init .*weights.safetensors"):
                setup.load_init(infopro_fast.build("resnet20", 3), path)


def test_weights_of_earlier_versions_are_read_with_a_word(finished, tmp_path, capsys):
    tensors = run_folder.read_weights(finished)
    assert capsys.readouterr().err == ""
    (tmp_path / run_folder.WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"about": "{}"}))
    (tmp_path / run_folder.CONFIG).write_bytes((finished / run_folder.CONFIG).read_bytes())
    assert evaluate_run(tmp_path) == evaluate_run(finished)
    assert "weights.safetensors has no checksum" in capsys.readouterr().err


def test_init_says_what_it_copied_and_refuses_another_network(tmp_path):
    small = infopro_fast.build("resnet32", 4)
    path = tmp_path / "small.pth"
    torch.save({"epoch": 3, "state_dict": small.released_state_dict()}, path)
    large = infopro_fast.build("resnet110", 4)
    before = {name: t.clone() for name, t in large.released_state_dict().items()}
    counts = r"init .*small.pth: \d+ of \d+ tensors fit; missing: \S+, \S+, \S+ and \d+ more; left over: "
    with pytest.raises(ConfigError, match=rf"{counts}.*: expected 90%.* got 30%.*--init-partial takes it"):
        setup.load_init(large, path)
    assert all(torch.equal(t, before[name]) for name, t in large.released_state_dict().items())

    text = setup.load_init(large, path, partial=True)
    given, own = small.released_state_dict(), large.released_state_dict()
    same = [n for n in own if n in given and own[n].shape == given[n].shape]
    assert all(torch.equal(own[n], given[n]) for n in same) and len(own) > 3 * len(same)
    assert f"{len(same)} of {len(own)} tensors copied" in text

    other = infopro_fast.build("resnet32", 16, local_loss="softmax", num_classes=100)  # other heads
    text = setup.load_init(other, path)
    assert "missing: fc.weight, fc.bias, " in text and "left over: fc.weight, fc.bias, " in text
    whole = {f"module.{name}": t for name, t in other.released_state_dict().items()}
    other.load_released_state_dict({"epoch": 3, "state_dict": whole})


def test_init_is_told_once(tmp_path, finished, capsys):
    fit(tiny_run.config(tmp_path / "run", epochs=1, warmup=0, init=finished / run_folder.WEIGHTS))
    assert capsys.readouterr().out.count("tensors copied; missing: nothing; left over: nothing") == 1


def test_weights_by_the_authors_names_are_not_the_networks_own(finished):
    net = infopro_fast.build("resnet20", 3)
    with pytest.raises(ValueError, match="load_state_dict: .* as a run's weights have: use load_rel"):
        net.load_state_dict(run_folder.read_weights(finished))
    net.load_state_dict(net.state_dict())


# --------------------------------------------------------------------------------------------------------
# The run folder


@pytest.mark.parametrize("name", [run_folder.CONFIG, run_folder.METRICS, run_folder.CHECKPOINTS])
@pytest.mark.fast(1)
def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, finished, name):
    """With the settings alone, with lines of metrics, with half a checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    (run / run_folder.LOCK).touch()
    config = tiny_run.config(run).resolved()
    (run / run_folder.CONFIG).write_text(config.to_json())
    if name == run_folder.METRICS:
        (run / name).write_text('{"kind": "step"')
    if name == run_folder.CHECKPOINTS:
        (run / name / (whole_files.ASIDE + checkpoint.name_of(0, 0))).mkdir(parents=True)
    with pytest.raises(RunError, match="run exists already: .* or continue it with --resume"):
        fit(config)
    assert_same_weights(resume(run), finished)


def test_a_folder_whose_settings_were_never_whole_is_free(tmp_path, finished):
    run = tmp_path / "run"
    run.mkdir()
    for name in (run_folder.LOCK, whole_files.ASIDE + run_folder.CONFIG):
        (run / name).write_text("{")
    assert_same_weights(fit(tiny_run.config(run)), finished)


def _begin(barrier, out, seed, found):
    with contextlib.ExitStack() as held:
        barrier.wait()
        try:
            run = run_folder.create(tiny_run.config(out, seed=seed).resolved(), held)
        except RunError as error:
            found.put(str(error))
            barrier.wait()
            return
        barrier.wait()  # the other has given up
        found.put((seed, str(run), json.loads((run / run_folder.CONFIG).read_text())["seed"]))


@pytest.mark.parametrize("named", [True, False])
def test_two_runs_that_begin_at_once(tmp_path, monkeypatch, named):
    """In the same --out one of them begins and the other is refused; without --out each has its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        barrier, found = context.Barrier(2), context.Queue()
        out = tmp_path / str(attempt) if named else None
        both = [context.Process(target=_begin, args=(barrier, out, seed, found)) for seed in (1, 2)]
        for process in both:
            process.start()
        results = [found.get(timeout=60) for _ in both]
        for process in both:
            process.join()
        begun = [result for result in results if not isinstance(result, str)]
        assert all(seed == written for seed, _, written in begun), results
        assert len({run for _, run, _ in begun}) == len(begun) == (1 if named else 2), results
        refused = [result for result in results if isinstance(result, str)]
        assert all("in use by another process" in text or "exists already" in text for text in refused)


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_run_folder_that_goes_away_ends_the_run_at_the_next_checkpoint(tmp_path, monkeypatch, how):
    run = tmp_path / "run"

    def go(trainer, metrics):
        shutil.rmtree(run) if how == "removed" else run.rename(tmp_path / "elsewhere")

    at_step(monkeypatch, 2, go)
    with pytest.raises(RunError, match="run was removed or moved while the run trained: metrics.jsonl"):
        fit(tiny_run.config(run))
    assert not (run / run_folder.CHECKPOINTS).exists()


# --------------------------------------------------------------------------------------------------------
# Signals and memory


def test_ignored_warnings_stay_ignored(tmp_path):
    """nohup ignores SIGHUP; SIGINT and SIGTERM are for the run whatever started it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signum is None
            signal.raise_signal(signal.SIGUSR1)
            assert stop.signum == signal.SIGUSR1 and not stop.overdue
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_warning_before_the_end_does_not_interrupt(tmp_path):
    """A shell and a terminal both send SIGHUP, a scheduler SIGUSR1 and then SIGTERM."""
    with StopRequest(tmp_path) as stop:
        for signum in (signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(signum)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_stops_inside_a_step_that_takes_long(tmp_path, monkeypatch, finished):
    """Before the next module; half a step is not saved, and the run continues to the same bits."""
    run, seen, real = tmp_path / "run", [], LocalTrainer._part
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "GRACE", -1.0)

        def part(self, *args, **options):
            at = self.at

            def counted(module, images):
                seen.append(module)
                if len(seen) == 17:  # the second module of the sixth step
                    signal.raise_signal(signal.SIGTERM)
                at(module, images)

            self.at = counted
            try:
                return real(self, *args, **options)
            finally:
                self.at = at

        patch.setattr(LocalTrainer, "_part", part)
        with pytest.raises(errors.Stopped, match="stopped by SIGTERM; continue with"):
            fit(tiny_run.config(run))
    assert len(seen) == 17
    last = checkpoint.list_checkpoints(run / run_folder.CHECKPOINTS)[-1]
    assert last.name == checkpoint.name_of(1, 0)
    assert_same_weights(resume(run), finished)


def test_out_of_memory_says_where_and_what_to_do(tmp_path, monkeypatch):
    at_step(monkeypatch, 6, lambda *_: torch.empty(1 << 50))
    message = "^epoch 2, step 2 of 4: out of memory .*smaller batch size"
    with pytest.raises(errors.OutOfMemory, match=message) as found:
        fit(tiny_run.config(tmp_path / "run"))
    assert "\n" not in str(found.value) and errors.exit_code(found.value) == 1


def test_a_batch_larger_than_the_data_set_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 53: there are only 52 training images"):
        fit(tiny_run.config(tmp_path / "run", batch_size=53))
    assert not (tmp_path / "run").exists()


def test_stdout_that_fails_does_not_end_a_run(tmp_path, monkeypatch, finished):
    """Under the command line, whose streams last; a full disk is /dev/full."""
    from infopro_fast import output

    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        with output.lasting():
            run = fit(tiny_run.config(tmp_path / "run"))
        assert os.fstat(full.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    assert_same_weights(run, finished)
