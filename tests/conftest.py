"""Runs the Triton kernels on the GPU, else in Triton's interpreter on the CPU (float32 and float16; its bfloat16 is
wrong).

Without triton (or with `-p tests.hide_triton`) the tests that ask for kernels are skipped, the others run.
"""

import os
import signal
import sys

import optimoe.threads  # before torch

import torch

# Graphs that torch keeps have the shapes that a tile table gave when they were compiled.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job of a shell; some tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny shapes; and the same bits as in the tests' subprocesses, which have one thread

import pytest  # noqa: E402

from moe_kernels.language import MISSING  # noqa: E402
from tests import interpreter  # noqa: E402
from tests.checks import poisoned_empty  # noqa: E402

pytest.register_assert_rewrite("tests.evalrun")  # a plugin of files that also import it
if not MISSING and os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.reduce_whole_slices()
    interpreter.take_numbers_from_arrays()


def pytest_fixture_setup(fixturedef):
    torch.manual_seed(0)  # the same numbers whatever ran before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    torch.manual_seed(0)
    try:
        return (yield)
    except Exception as error:  # opcheck and pytest.raises wrap the message
        if MISSING and MISSING in str(error):
            pytest.skip("needs triton")
        raise


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
