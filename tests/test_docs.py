"""The documents: their commands parse, their figures exist, their tables are those of the measurements."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools.command.egg_info
import torch

from benchmarks import report, step_figure
from infopro_fast import cli
from infopro_fast.planning import plan
from infopro_fast.studies import known, results, summary, tables
from infopro_fast.trainer import TrainConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BEGINNINGS = ("infopro-fast ", "python -m benchmarks.", "torchrun ")


def blocks(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", document.read_text())


def commands(document: Path) -> list[str]:
    """Return the commands of the indented blocks and of those in bash."""
    lines = (line.strip() for line in document.read_text().splitlines() if line.startswith("    "))
    lines = [*lines, *(line for block in blocks(document, "bash") for line in block.splitlines())]
    return [line for line in lines if line.startswith(BEGINNINGS)]


PYTHON = [
    pytest.param(block, id=f"{document.name}-{i}")
    for document in DOCUMENTS for i, block in enumerate(blocks(document, "python"))
]


@pytest.mark.parametrize("block", PYTHON)
def test_code_of_the_documents_runs(block, monkeypatch, capsys):
    """Blocks that import what they use run; others are parsed."""
    code = compile(block, "document", "exec")
    if block.startswith(("import ", "from ")) and "batches" not in block and "torchao" not in block:
        exec(code, {})


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.fast(3)
def test_examples_run(path, tmp_path):
    assert len(path.read_text().splitlines()) < 60
    if path.stem == "lightning_module":
        pytest.importorskip("lightning")
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def check(command: str) -> None:
    """Parse a command without running it. Raises SystemExit where its parser refuses it."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["python", "-m"]:
        _check_benchmark(words[2], words[3:])
        return
    parsed = cli.parse(words[words.index("infopro_fast") + 1 :] if words[0] == "torchrun" else words[1:])
    if isinstance(parsed, tables.Study):
        assert tables.jobs(parsed)  # makes the settings of every run


class _Parsed(Exception):
    pass


def _check_benchmark(name: str, arguments: list[str]) -> None:
    """Run its main, stopped behind the parser."""
    module = importlib.import_module(name)
    assert hasattr(module, "argparse"), f"{name} takes no arguments and would run"
    with pytest.MonkeyPatch.context() as patch:
        real = argparse.ArgumentParser.parse_args

        def parse_and_stop(self, *args, **kwargs):
            real(self, *args, **kwargs)
            raise _Parsed

        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(_Parsed):
            module.main()


ALL = [
    pytest.param(command, id=f"{document.name}-{i}")
    for document in DOCUMENTS for i, command in enumerate(commands(document))
]


@pytest.mark.parametrize("command", ALL)
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "RUN" in command:  # its settings are the defaults of the flags
        Path("RUN").mkdir()
        Path("RUN/config.json").write_text(TrainConfig().resolved().to_json())
    if "plan.json" in command:  # which is read with the settings
        plan("resnet20", batch_size=8, modules=4).write(tmp_path / "plan.json")
        command += " --arch resnet20 --batch-size 8"
    check(command)


def test_every_section_of_results_has_its_command():
    """Sections of docs/results.md have commands, so that the test above cannot pass by finding nothing."""
    sections = re.split(r"(?m)^##+ .*$", (ROOT / "docs/results.md").read_text())[1:]
    assert len(sections) >= 10
    for section in sections:
        indented = [line[4:] for line in section.splitlines() if line.startswith("    ")]
        assert any(line.startswith(BEGINNINGS) for line in indented), section[:200]


@pytest.mark.parametrize(
    "command",
    [
        "infopro-fast reproduce table2 --job 2 2", "infopro-fast reproduce table4",
        "infopro-fast reproduce table2 --seeds 0", "infopro-fast train --recipe table4/resnet7",
        "python -m benchmarks.report --plot-all", "python -m benchmarks.floors write",
    ],
)
def test_wrong_commands_do_not(command):
    with pytest.raises((SystemExit, ValueError)):
        check(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_show_is_there(document):
    prose = re.sub(r"(?s)```.*?```|`[^`\n]*`", "code", document.read_text())
    targets = re.findall(r"\]\(([^)#\s]+)\)", prose)
    local = [target for target in targets if "://" not in target]
    assert not [target for target in local if not (document.parent / target).exists()]


def test_what_the_layout_names_is_there():
    layout = (ROOT / "docs/architecture.md").read_text()
    named = {*re.findall(r"[\w/]+\.(?:py|sh|h)\b", layout), *re.findall(r"(?m)^ +(\w+)/ ", layout)}
    there = {path.name for path in ROOT.rglob("*")}
    assert len(named) > 50 and not {name for name in named if Path(name).name not in there}


def test_a_source_distribution_has_what_documents_and_tests_read(monkeypatch):
    """MANIFEST.in, which setuptools follows, has the documents, their figures and all beside the code."""
    monkeypatch.chdir(ROOT)
    files = setuptools.command.egg_info.FileList()
    for line in Path("MANIFEST.in").read_text().splitlines():
        files.process_template_line(line)
    folders = ("docs", "benchmarks", "tests", "csrc")
    there = {path for folder in folders for path in Path(folder).rglob("*") if path.is_file()}
    there = {str(path) for path in there if path.suffix not in (".pyc", ".so")}
    assert len(there) > 150 and not there - set(files.files)


REPRODUCE = "infopro-fast reproduce "
STUDIES = [command for command in commands(ROOT / "docs/results.md") if command.startswith(REPRODUCE)]


@pytest.mark.parametrize("command", STUDIES, ids=range(len(STUDIES)))
def test_tables_are_those_of_their_runs(command, tmp_path):
    """The command in front of a table writes the Markdown beside the table's JSON from its runs."""
    study = cli.parse(shlex.split(command)[1:])
    folder = ROOT / "docs/results" / ("" if study.out == Path("reproduction") else study.out)
    table = folder / f"{study.table}.json"
    study = dataclasses.replace(study, known=(table,), out=tmp_path, train=False, measure=False)
    found = results.collect(study, known.read(study))
    assert len(found) == len(json.loads(table.read_text())["cells"])
    assert table.with_suffix(".md").read_text() == summary.markdown(study, found)


# ------------------------------------------------------------------------------------------------------------
# A training step


def test_the_step_table_is_that_of_the_measurements():
    rows = step_figure.read(step_figure.RESULTS / "results.jsonl")
    written = (step_figure.RESULTS / "train_step.md").read_text()
    assert written == step_figure.markdown(rows), "run python -m benchmarks.step_figure"


def row(method: str, K: int, seconds: float, mib: int) -> step_figure.Row:
    where = dict(device="a machine", threads=2, isa="avx2", torch="2", commit="c")
    name, peak = f"resnet32 N128 K{K}", mib * 2**20
    return step_figure.Row("train_step", name, method, "step", seconds, peak_bytes=peak, **where)


def test_step_table_and_figure(tmp_path):
    """K where it was measured, whatever the order of the rows; ratios are against ours with the same K."""
    rows = [row("released", 1, 0.2, 300), row("ours", 1, 0.1, 290)]
    rows += [row("released", 16, 0.9, 100), row("ours", 16, 0.3, 50)]
    table, figure = step_figure.write(rows, tmp_path)
    text = table.read_text()
    assert "A training step of resnet32, batch 128; a machine, 2 threads, avx2, torch 2, c." in text
    assert "| released formulation, eager | 200 (2.0) | 900 (3.0) |" in text
    assert "| here | 100 | 300 |" in text
    assert "| released formulation, eager | 300 | 100 |" in text and "| here | 290 | 50 |" in text
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"train_step.md", "train_step.png"}


def test_peaks_are_of_as_many_threads_as_times(monkeypatch):
    """As --threads says, for an op and for a step."""
    asked = []

    def peak_bytes(target, threads=2, **_):
        asked.append(threads)
        return {"peak": 2, "returned": 1}

    monkeypatch.setattr(report.memory, "peak_bytes", peak_bytes)
    monkeypatch.setattr(report, "alone", lambda *_: dict.fromkeys(report.shapes.TRAIN_STEP, 0.1))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as `alone` does in the process that measures an op
    try:
        report.add_peak(report.Row("supcon_loss", "", "ours", "both", 0.1), report.shapes.SUPCON[0])
    finally:
        torch.set_num_threads(before)
    steps = report.measure_steps(rounds=1, threads=5)
    assert asked == [1] + [5] * len(steps) and len(steps) > 2


def test_no_rows_of_a_step_is_an_error(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"op": "supcon_loss"}\n')
    message = "results.jsonl: expected rows of train_step, got none: run python -m benchmarks.report"
    with pytest.raises(ValueError, match=message):
        step_figure.read(tmp_path / "results.jsonl")
