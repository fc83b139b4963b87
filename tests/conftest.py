"""Runs Triton kernels on the GPU if there is one, else in the interpreter on the CPU (where bfloat16 is wrong)."""

import os
import sys

import optimoe as optimoe  # isort: skip  (before torch: how its threads wait)
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
torch.set_num_threads(min(torch.get_num_threads(), 4))

import pytest  # noqa: E402

from tests.checks import poisoned_empty  # noqa: E402


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison():
    """Fresh buffers hold NaN (integers: a huge index) until written, so that reading one before writing it shows."""
    with poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def figures():
    """Closes what a test has drawn."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
