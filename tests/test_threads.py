"""Programs set how torch's threads wait before they import torch. Run: python -m pytest tests/test_threads.py"""

import os
import subprocess
import sys

import pytest

PROGRAMS = ["train", "grpo", "eval.__main__", "eval.votes", "optimoe.hf", "optimoe.sizes", "study.sweep"]
SPY = """
import os, sys
class Spy:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0) if not sys.stdout.flush() else None
sys.meta_path.insert(0, Spy())
import importlib
importlib.import_module(sys.argv[1])
"""


def seen(program, **extra):
    """GOMP_SPINCOUNT and OMP_WAIT_POLICY when the program imports torch."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", SPY, program]
    return subprocess.run(command, env=env | extra, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_set_the_wait_before_torch(program):
    assert seen(program) == ["1000", "None"]


def test_what_a_user_has_set_is_left_alone():
    assert seen("train", GOMP_SPINCOUNT="7") == ["7", "None"]
    assert seen("train", OMP_WAIT_POLICY="ACTIVE") == ["None", "ACTIVE"]
