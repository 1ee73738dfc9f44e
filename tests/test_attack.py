"""Random kills and random damage: a run ends with the bits of one left alone, or with one clear line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack_driver import LINE, SAME


def attack(folder, kills, flips, seed=0):
    command = [sys.executable, "-m", "tests.attack_driver", *map(str, (folder, kills, flips, seed))]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["kill"].values()) == kills and sum(found["eval"].values()) == flips, found
    assert set(found["kill"]) <= {SAME}, found
    assert set(found["eval"]) | set(found["resume"]) <= {SAME, LINE}, found
    return found


@pytest.mark.slow
def test_a_few(tmp_path):
    attack(tmp_path, 2, 4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_and_a_hundred_flipped_bits(tmp_path):
    found = attack(tmp_path, 30, 100, seed=1)
    assert found["eval"][LINE] > 10 and found["resume"][LINE] > 10
