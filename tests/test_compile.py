"""Every kernel the layer ships, compiled for an H100 on any machine: no spilled registers, tensor cores in use, shared memory that fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.offline import SHARED_LIMIT

# T, D, F, E, K: each tile family at full and at small rows per expert; widths down to the smallest model; generation; the study.
SHAPES = [
    "4096,2048,768,16,8",
    "1024,2048,768,128,8",
    "4096,512,1024,16,4",
    "1536,1536,256,8,8",
    "512,128,256,8,2",
    "64,64,48,8,2",
    "4,512,1024,16,2",
    "8192,128,64,16,2",
]
GEMMS = {"up_kernel", "rows_kernel", "dswiglu_kernel", "dw_kernel"}


@pytest.fixture(scope="module")
def rows():
    # The interpreter replaces `triton.jit` at import, so compiling needs a process of its own.
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(
        [sys.executable, "-m", "tests.offline", *SHAPES],
        env=env,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return [json.loads(line) for line in out.stdout.splitlines()]


def test_every_kernel_compiles_without_spills(rows):
    assert {row["shape"] for row in rows} == set(SHAPES)
    assert GEMMS | {"muon_kernel"} < {row["name"] for row in rows}
    assert {f"{op}_{way}_kernel" for op in ("gated", "rope", "route") for way in ("fwd", "bwd")} < {
        row["name"] for row in rows
    }
    spilled = [row for row in rows if row["spilled"] > 0]
    assert not spilled, spilled


def test_shared_memory_fits(rows):
    assert max(row["shared"] for row in rows) <= SHARED_LIMIT


def test_large_tiles_use_wgmma_and_asynchronous_copies(rows):
    large = [row for row in rows if row["name"] in GEMMS and row["shape"] == SHAPES[0]]
    assert len(large) >= 4 and all(row["wgmma"] > 0 and row["async_copies"] > 0 for row in large)
    assert not any(row["wgmma"] for row in rows if row["name"] == "combine_kernel")  # the count can be zero


def test_elementwise_kernels_move_16_bytes_at_a_time(rows):
    moved = [
        row
        for row in rows
        if row["name"].startswith("gated_") or row["name"].startswith("rope_") and row["shared"] == 0
    ]
    assert len({row["name"] for row in moved}) == 4 and all(row["wide"] > 0 and row["narrow"] == 0 for row in moved), (
        moved
    )
    assert any(row["narrow"] for row in rows if row["name"] == "count_kernel")
