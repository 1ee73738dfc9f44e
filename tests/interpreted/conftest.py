"""Runs the tests of this folder in Triton's interpreter, which has to be switched on before Triton is
imported: in a child process.

A test here calls the public ops with impl="triton" on CPU tensors. In an ordinary run a child collects this
folder too and then runs those tests that it is asked for, one by one; each passes or fails here as it did
there. With `pytest -n N` every worker has a child. With TRITON_INTERPRET=1 set the tests run where they are,
for a debugger:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted -k supcon
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

from infopro_fast.ops import dispatch

FOLDER = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(FOLDER))
# of a child: descriptors that it reads ids of tests from, and writes how they ended to
PIPES = "INFOPRO_INTERPRETED_PIPES"
CHILD = pytest.StashKey["Child"]()


class Child:
    """A pytest process that runs one test at a time, in the interpreter."""

    def __init__(self) -> None:
        self._printed = tempfile.TemporaryFile("w+")
        theirs, requests = os.pipe()
        answers, theirs_too = os.pipe()
        environment = os.environ | {
            "TRITON_INTERPRET": "1", PIPES: f"{theirs} {theirs_too}", "PYTEST_ADDOPTS": ""
        }
        command = [
            sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", f"--rootdir={ROOT}",
            FOLDER,  # slow tests too: the parent asks
        ]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._printed, stderr=subprocess.STDOUT, pass_fds=(
                theirs, theirs_too
            )
        )
        os.close(theirs)
        os.close(theirs_too)
        self._requests, self._answers = requests, os.fdopen(answers)

    def run(self, nodeid: str) -> tuple[str, str]:
        """How the test ended, and its text. EOFError, with the child's output, if the child ended."""
        try:
            os.write(self._requests, f"{nodeid}\n".encode())
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            self._printed.seek(0)
            raise EOFError(f"the child ended with status {code}\n{self._printed.read()[-6000:]}")
        outcome, text = json.loads(answer)
        return outcome, text

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._requests)
        self._answers.close()
        self._printed.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """In the parent: report how the test ended in the child, and do not call its function."""
    if dispatch.INTERPRETED:
        return None
    if pyfuncitem.config.getoption("--reference-only"):
        pytest.skip("--reference-only")
    stash = pyfuncitem.config.stash
    if CHILD not in stash:
        stash[CHILD] = Child()
    try:
        outcome, text = stash[CHILD].run(pyfuncitem.nodeid)
    # a time limit, too: what it answers next would be taken for the next test's
    except BaseException as error:
        stash[CHILD].end()
        del stash[CHILD]
        if not isinstance(error, EOFError):
            raise
        outcome, text = "failed", str(error)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_unconfigure(config):
    if CHILD in config.stash:
        config.stash[CHILD].end()


# ----------------------------------------------------------------------------------------------------
# The child


def pytest_configure(config):
    """In the child and in a debugger."""
    if dispatch.INTERPRETED:
        from tests.interpreted import interpreter

        interpreter.quicken()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """In the child: run the tests that the parent asks for, one at a time."""
    if PIPES not in os.environ:
        return None
    requests, answers = map(int, os.environ[PIPES].split())
    items, reports = {item.nodeid: item for item in session.items}, Reports()
    session.config.pluginmanager.register(reports)
    with os.fdopen(requests) as asked, os.fdopen(answers, "w") as told:
        for line in asked:
            item = items[line.rstrip("\n")]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            told.write(json.dumps(reports.outcome()) + "\n")
            told.flush()
    return True


class Reports:
    """Reports of one test: its set-up, call and teardown."""

    def __init__(self) -> None:
        self._found: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report):
        self._found.append(report)

    def outcome(self) -> tuple[str, str]:
        """Outcome and text of the first part that did not pass."""
        worst = next((report for report in self._found if report.outcome != "passed"), self._found[-1])
        self._found.clear()
        return worst.outcome, worst.longrepr[2] if isinstance(worst.longrepr, tuple) else worst.longreprtext
