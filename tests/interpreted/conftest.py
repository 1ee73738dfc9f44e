"""Runs the tests of this folder in Triton's interpreter, which has to be switched on before Triton is imported: in a child process.

A test here calls the public ops with impl="triton" on CPU tensors. In an ordinary run the first of them starts one child with all that
were selected, and each then passes or fails as it did there; with `pytest -n N`, where another process may have the other files, a child
takes the tests of one file. With TRITON_INTERPRET=1 set they run where they are, for a debugger:

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
REPORT = "INFOPRO_INTERPRETED_REPORT"  # the file that the child writes one JSON line a test to
OUTCOMES = pytest.StashKey[dict]()  # by folder or file: what its child found


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """In the parent: do not call the test's function, tell how it ended in the child."""
    if dispatch.INTERPRETED:
        return None
    if pyfuncitem.config.getoption("--reference-only"):
        pytest.skip("--reference-only")
    found = pyfuncitem.session.stash.setdefault(OUTCOMES, {})
    together = str(pyfuncitem.path) if "PYTEST_XDIST_WORKER" in os.environ else FOLDER
    if together not in found:
        found[together] = _run_in_a_child([item.nodeid for item in pyfuncitem.session.items if str(item.path).startswith(together)])
    outcome, text = found[together].get(pyfuncitem.nodeid, ("failed", found[together]["output"]))
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def _run_in_a_child(nodeids: list[str]) -> dict:
    """{nodeid: (outcome, text)}, and under "output" what the child printed last, for a test it never came to."""
    with tempfile.TemporaryDirectory() as folder:
        report, selection = os.path.join(folder, "report"), os.path.join(folder, "selection")
        with open(selection, "w") as file:
            file.write("\n".join(nodeids))
        environment = os.environ | {"TRITON_INTERPRET": "1", REPORT: report}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"@{selection}"]
        child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        outcomes = {"output": f"not run: the child ended with status {child.returncode}\n{child.stdout[-3000:]}\n{child.stderr[-3000:]}"}
        if os.path.exists(report):
            with open(report) as file:
                outcomes |= {nodeid: (outcome, text) for nodeid, outcome, text in map(json.loads, file)}
        return outcomes


def pytest_runtest_logreport(report):
    """In the child: one line a test, on how its call ended, or what came before it when that failed."""
    if REPORT in os.environ and (report.when == "call" or report.outcome != "passed"):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        with open(os.environ[REPORT], "a") as file:
            file.write(json.dumps((report.nodeid, report.outcome, text)) + "\n")
