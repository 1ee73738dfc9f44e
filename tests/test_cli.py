"""The command line as people use it: processes, exit codes, one-line errors; --help without torch."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import infopro_fast
from infopro_fast import cli, errors
from infopro_fast.data import fashion_mnist
from infopro_fast.trainer import checkpoint, run_folder
from infopro_fast.trainer import run as runs
from tests import tiny_run

ROOT = Path(__file__).parent.parent


def run_process(*argv, **options):
    command = [sys.executable, "-m", "infopro_fast", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def run_here(capsys, *argv):
    """Exit code, stdout, stderr of a call in this process, which saves starting Python."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def assert_one_line(err):
    assert err.startswith("infopro-fast: error: ") and err.count("\n") == 1, err
    assert not re.search("[╭│╰─]|---|Traceback|\x1b", err), err


@pytest.mark.parametrize(
    "argv,message",
    [
        (
            [],
            r"Expected one of \{train, eval, plan, memory, recipes, scale, analyze, reproduce, info\}. "
            r"\(see infopro-fast --help\)",
        ),
        (["trian"], r"trian: no such command; did you mean train\? \(see infopro-fast --help\)"),
        (["xyzzy"], r"xyzzy: no such command \(see"),
        (["--verson"], "Unrecognized options: --verson"),
        (
            ["train", "--learning-rate", "3"],
            r"Unrecognized options: --learning-rate, 3 \(see infopro-fast train --help\)",
        ),
        (["train", "--epoch", "3"], r"--epoch, 3; did you mean --epochs\? \(see infopro-fast train --help\)"),
        (["eval", "run", "--multiscale"], r"--multiscale; did you mean --multi-scale\?"),
        (["train", "--lr", "fast"], "--lr.*could not convert string to float: 'fast'"),
        (["train", "--lr", "-1"], "lr: expected a positive number, got -1.0"),
        (
            ["train", "--arch", "resnet33"],
            "arch: expected one of .*resnet32, .* got 'resnet33'",
        ),
        (["train", "--lambdas", "1", "2"], "--lambdas: expected 4 values with spaces .*, got '1', '2' "),
        (["train", "--lambdas", "1,2"], "--lambdas: expected 4 values with spaces .*, got '1,2' "),
        (["train", "--cuts", "1", "2", "3"], "--cuts: "),
        (
            ["train", "--local-loss", "none", "--modules", "4"],
            "local_loss none trains end to end: expected modules 1, got 4",
        ),
        (
            ["train", "--dataset", "cifar10"],
            "needs .* original files: give --data-root DIR, and --download to fetch them into it\n",
        ),
        (["train", "--dataset", "cifar10", "--download"], "original files: give --data-root DIR\n"),
        (["train", "--dataset", "imagenet"], "original files: give --data-root DIR\n"),
        (["train", "--init-partial"], "init_partial: expected init, a file of weights"),
        (["train", "--batch-size", "99999"], "batch_size 99999: there are only [0-9]+ training images"),
        (["train", "--download"], "fashion_mnist comes with the package"),
        (["train", "--modules", "40"], "modules: expected 1 to 16 for resnet32"),
        (
            ["train", "--epochs", "3", "--iterations", "100"],
            "epochs and iterations: each says how long to train: expected one of them",
        ),
        (
            ["train", "--resume-previous"],
            "--resume-previous says which checkpoint --resume takes: add --resume RUN",
        ),
        (["train", "--resume", "no/such/run"], "no/such/run is not a run folder"),
        (["train", "--device", "abacus"], "device: expected auto, cpu, cuda or cuda:N, got .abacus"),
        (["eval"], "Missing from infopro-fast eval: PATH"),
        (["eval", "no/such/run"], "no/such/run is not a run folder: it has no config.json"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys, argv, message):
    code, out, err = run_here(capsys, *argv)
    assert code == 2 and out == ""
    assert_one_line(err)
    assert re.search(message, err), err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_one_line_whatever_the_terminal_can_show(encoding):
    done = run_process("train", "--lr", "fast", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 2 and done.stderr.startswith("infopro-fast: error: Error parsing --lr: ")
    assert_one_line(done.stderr)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["recipes"]])
def test_text_is_shown_as_far_as_the_terminal_can(argv, encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = run_process(*argv, env=env, encoding=encoding)
    assert done.returncode == 0 and done.stdout and done.stderr == ""


def test_nobody_reads_what_is_printed():
    """Through `head`, into a full disk, and with stdout closed: no error, and exit code 0."""
    command = f"{sys.executable} -u -m infopro_fast recipes"
    for tail in ("| head -n 1 | wc -l; exit ${PIPESTATUS[0]}", "> /dev/full", ">&-", ">&- 2>&-"):
        done = subprocess.run(["bash", "-c", f"{command} {tail}"], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), tail


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def fail(config):
        torch.empty(1 << 50)

    monkeypatch.setattr(runs, "fit", fail)
    code, _, err = run_here(capsys, "train")
    assert code == 1 and re.search("error: out of memory .*: take a smaller batch size, accumulate", err)
    assert_one_line(err)


def test_wrong_data_folders(capsys, tmp_path):
    for name, message in (
        ("cifar10", "data_batch_1 not found"),
        ("stl10", "train_X.bin not found"),
        ("svhn", "svhn: "),
    ):
        code, _, err = run_here(capsys, "train", "--dataset", name, "--data-root", tmp_path)
        assert code == 2 and message in err
        assert_one_line(err)
        code, _, err = run_here(capsys, "train", "--dataset", name, "--data-root", tmp_path / "nowhere")
        assert code == 2 and (f"{name}: --data-root {tmp_path}/nowhere is not a folder" in err)


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Only errors that are for people are made short."""
    monkeypatch.setattr(runs, "fit", lambda config: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["train"])


@pytest.mark.parametrize(
    "error,code",
    [
        (errors.NonFiniteError("module 1"), 1),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_of_runs_that_go_wrong(monkeypatch, capsys, error, code):
    def fail(config):
        raise error

    monkeypatch.setattr(runs, "fit", fail)
    found, _, err = run_here(capsys, "train")
    assert found == code and err.count("\n") == 1 and err.startswith("infopro-fast: ")


def test_train_resume_eval(monkeypatch, capsys, tmp_path):
    """Flags reach the run; eval finds the accuracy that training printed."""
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    run = tmp_path / "run"
    flags = "--arch resnet20 --modules 3 --local-loss softmax --lambdas 2 0 0 1 --epochs 2 --warmup 0"
    flags = f"{flags} --batch-size 16 --lr 0.03".split()
    code, out, err = run_here(
        capsys,
        "train",
        *flags,
        "--seed",
        4,
        "--threads",
        1,
        "--dtype",
        "float64",
        "--no-augment",
        "--out",
        run,
    )
    assert code == 0 and err == ""
    last = run_folder.read_metrics(run, "epoch")[-1]
    accuracy = f"test accuracy {100 * last['test']['accuracy']:.2f} %"
    assert out.splitlines()[-1].startswith(accuracy) and out.splitlines()[-1].endswith(f"run folder {run}")
    config = run_folder.read_config(run)
    assert (config.arch, config.modules, config.local_loss, config.lambdas) == (
        "resnet20",
        3,
        "softmax",
        (2, 0, 0, 1),
    )
    assert (config.epochs, config.batch_size, config.lr, config.seed) == (2, 16, 0.03, 4)
    assert (config.dtype, config.augment, config.out) == ("float64", False, run)
    assert set(last["train"]) == {
        "module1/reconstruction",
        "module2/softmax",
        "module2/softmax_accuracy",
        "loss",
        "accuracy",
    }

    code, out, err = run_here(capsys, "eval", run, "--device", "cpu")
    right, loss = round(last["test"]["accuracy"] * 20), f"cross entropy {last['test']['loss']:.4f}"
    assert (
        code == 0
        and out == f"{run}: {accuracy} ({right} of 20), top-5 {100 * last['test']['top5']:.2f} %, {loss}\n"
    )

    for path in checkpoint.list_checkpoints(run / "checkpoints"):  # both
        (path / "state.json").write_text("{}")
    code, _, err = run_here(capsys, "train", "--resume", run)
    assert (
        code == 2 and "epoch0002-batch000000 is damaged: state.json" in err and "add --resume-previous" in err
    )
    code, _, err = run_here(capsys, "train", f"--resume={run}", "--resume-previous")
    assert code == 2 and "epoch0001-batch000000 is damaged" in err and "add --resume-previous" not in err
    code, _, err = run_here(capsys, "train", "--out", run, "--batch-size", 16)
    assert code == 2 and f"{run} exists already" in err


def test_a_run_is_repeated_with_changes(monkeypatch, capsys, tmp_path):
    """`--config` takes a run's settings, and the run folder is another one; nothing is named twice."""
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    first, second = tmp_path / "first", tmp_path / "second"
    flags = "--arch resnet20 --shrink 4 --epochs 1 --batch-size 16 --threads 1 --local-loss softmax".split()
    assert run_here(capsys, "train", *flags, "--out", first)[0] == 0
    assert run_here(capsys, "train", "--config", first / "config.json", "--out", second, "--seed", 1)[0] == 0
    one, two = (run_folder.read_config(run) for run in (first, second))
    assert two == dataclasses.replace(one, out=second, seed=1)
    command = cli.parse(["train", "--config", str(first), "--local-loss", "greedy", "--modules", "2"])
    assert command.settings.out is None  # a new name, not the run's folder
    assert (command.settings.resolved().lambdas, command.settings.batch_size) == (None, 16)
    code, _, err = run_here(capsys, "train", "--config", first, "--resume", first)
    assert (
        code == 2 and "--config and --resume: each says where settings come from: expected one of them" in err
    )
    code, _, err = run_here(capsys, "train", "--config", first, "--epochs", 2, "--iterations", 5)
    assert code == 2 and "epochs and iterations: each says how long to train" in err
    (tmp_path / "own.yaml").write_text("lr: 0.3\nepoch: 4\n")
    code, out, err = run_here(capsys, "train", "--config", tmp_path / "own.yaml")
    assert code == 2 and out == "" and "own.yaml: epoch: no such setting; did you mean epochs?" in err
    assert_one_line(err)


def test_version(capsys):
    assert run_here(capsys, "--version") == (0, f"infopro-fast {infopro_fast.__version__}\n", "")


def test_help_shows_the_defaults_of_a_recipe(capsys):
    code, out, err = run_here(capsys, "train", "--recipe", "table2/cifar10/resnet32/k4/contrast", "--help")
    words = re.sub(r"[\s│]+", " ", out)
    assert code == 0 and err == "" and all(f"(default: {n})" in words for n in ("1024", "0.8", "160"))


def test_help_is_quick_and_complete():
    """No torch, and every setting with its explanation."""
    code = "import sys; from infopro_fast import cli\ntry: cli.main(['train', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    for name in run_folder.TrainConfig.__dataclass_fields__:
        assert (
            f"--{name.replace('_', '-')} " in done.stdout or f"--{name.replace('_', '-')}," in done.stdout
        ), name
    assert all(word in done.stdout for word in ("--config", "--resume", "damaged"))
    assert "default: None" not in done.stdout
    done = run_process("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in (*cli.COMMANDS, "--version"))


def test_info(capsys):
    from infopro_fast import info

    code, out, err = run_here(capsys, "info")
    assert code == 0 and err == "" and out == info.report() + "\n"


def test_module_and_script_are_the_same_command():
    done = run_process("train", "--nonsense")
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.fast(1)
def test_ctrl_c_on_a_real_run(tmp_path, signum):
    """On all the embedded images: stops within a step, says how to continue, and the run can be continued and
    stopped again."""
    run = tmp_path / "run"
    settings = "--arch resnet20 --modules 2 --batch-size 16 --threads 1 --log-every 1".split()
    command = [sys.executable, "-m", "infopro_fast", "train"]
    for arguments in ([*settings, "--out", str(run)], ["--resume", str(run)]):
        process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        before = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
        end = time.monotonic() + 100
        while (
            not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size <= before
        ):  # until a step is logged
            assert time.monotonic() < end and process.poll() is None, (
                process.stderr.read() if process.poll() is not None else "too slow"
            )
            time.sleep(0.05)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, err
        assert (
            err
            == f"infopro-fast: stopped by {signum.name}; continue with: infopro-fast train --resume {run}\n"
        )
        last = checkpoint.list_checkpoints(run / "checkpoints")[-1]
        state = checkpoint.load(last)
        assert state["batch"] >= 1 and len(run_folder.read_metrics(run, "step")) == state["batch"]
    assert "continuing" in out and last.name > checkpoint.name_of(0, 1)
    assert os.access(run / "config.json", os.R_OK)
