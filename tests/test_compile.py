"""Every kernel that is shipped, compiled for several GPUs on any machine: no spilled registers, tensor cores in use,
shared memory that fits, no warning of ptxas."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_kernels import grouped_gemm, language, moe_experts, reference
from moe_kernels.tiles import LIMITS, _gemm_tiles, interpreting, limits
from tests.checks import check, problem

ROOT = Path(__file__).parent.parent
LARGE = "4096,1024,768,16,8"
# T, D, F, E, K for an H100: each tile family at full and at small rows per expert; widths down to the smallest model;
# generation; the study.
SHAPES = [
    LARGE,
    "1024,2048,768,2,1",
    "1024,512,768,2,1",
    "1024,2048,768,128,8",
    "1024,2048,768,128,4",
    "1536,1536,256,8,8",
    "512,128,256,8,2",
    "64,64,48,8,2",
    "4,512,1024,16,2",
    "8192,128,64,16,2",
]
OTHERS = [arch for arch in LIMITS if arch != 90]
GEMMS = {"up_kernel", "rows_kernel", "dswiglu_kernel", "dw_kernel"}
HOPPER = {"up_hopper_kernel", "rows_hopper_kernel", "dswiglu_hopper_kernel", "dw_hopper_kernel"}


def run(*words, check=True):
    # The interpreter replaces `triton.jit` at import, so compiling needs a process of its own.
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.compile", *words]
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 or not check, out.stdout[-3000:] + out.stderr[-3000:]
    return out


def rows_of(*words):
    return [json.loads(line) for line in run("--json", *words).stdout.splitlines()]


def test_the_cache_of_other_programs_is_not_used(monkeypatch, tmp_path):
    """torch.compile may have filled it by another ptxas, whose PTX this one refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows_of("64,64,48,8,2")
    assert [path.name for path in tmp_path.iterdir()] == ["offline"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The rows of the large shape, and the folder with its code."""
    out = tmp_path_factory.mktemp("code")
    return rows_of(LARGE, f"--out={out}"), out / f"{LARGE}-sm_90"


@pytest.fixture(scope="module")
def hopper(written):
    return written[0] + rows_of(*SHAPES[1:-1]) + rows_of(SHAPES[-1], "--all")


@pytest.fixture(scope="module")
def others():
    return rows_of(LARGE, "--arch=" + ",".join(f"sm_{arch}" for arch in OTHERS))


def test_every_kernel_compiles_without_problems(hopper):
    assert {row["shape"] for row in hopper} == set(SHAPES)
    names = {row["name"] for row in hopper}
    assert GEMMS | HOPPER | {"muon_kernel", "adamw_kernel", "squares_kernel", "cross_entropy_kernel"} < names
    assert {f"{op}_{way}_kernel" for op in ("gated", "rope", "route") for way in ("fwd", "bwd")} < names
    steps = ("linear", "rotate", "attention", "route_few", "up_few", "down_few", "greedy")
    assert {f"{op}_kernel" for op in steps} < names
    assert not [row for row in hopper if row["problems"]]  # run() fails before that


def test_problems_are_found():
    # Tiles of a GPU with more shared memory: the row says so, and the exit code is 1.
    code = (
        "from moe_kernels import tiles; import sys; from bench import compile as program;"
        "tiles.LIMITS[86] = tiles.LIMITS[90];"
        "program.LIMITS = {86: tiles.LIMITS[86]._replace(shared=99 * 1024)}; program.main(sys.argv[1:])"
    )
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, "2048,256,256,2,2", "--arch=sm_86"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 1 and "bytes of shared memory too many" in out.stdout and "have problems" in out.stderr


def test_large_tiles_use_tensor_cores_and_asynchronous_copies(hopper, others):
    for arch in (90, *OTHERS):
        large = [row for row in hopper + others if (row["arch"], row["shape"]) == (f"sm_{arch}", LARGE)]
        gemms = [row for row in large if row["name"] in GEMMS | HOPPER]
        assert {row["use"] for row in gemms} == {"up", "down", "dswiglu", "dx", "dw_in", "dw_out"}, arch
        assert all(row["wgmma" if arch == 90 else "mma"] > 0 and row["copies"] + row["tma"] > 0 for row in gemms), gemms
        assert all(row["tma"] > 0 for row in gemms) == (arch >= 90)
        hopper_only = {row["use"] for row in gemms if row["name"] in HOPPER}
        assert hopper_only == ({row["use"] for row in gemms} if arch == 90 else set())
        # Indices and row sums take a few narrow accesses. Weights and rows in smaller pieces would be 70 or more. Each
        # thread of the two warps that load for `up` has 16 token ids of a tile and 16 of the next one.
        assert all(row["narrow"] < (41 if row["name"] == "up_hopper_kernel" else 30) for row in gemms), gemms
    assert not any(row["wgmma"] for row in hopper if row["name"] == "combine_kernel")  # the count can be zero


def test_products_of_copied_rows_are_fenced(hopper):
    # cp.async writes through the generic proxy and wgmma reads through the asynchronous one.
    # Triton puts a fence between them since 3.7, before that language.launch does; the Hopper kernels have their own.
    # `down` and `dx` copy only indices, which wgmma does not read.
    gathering = [row for row in hopper if row["use"] in ("up", "dswiglu", "dw_in", "dw_out") and row["wgmma"]]
    assert {row["name"] for row in gathering} == (GEMMS | HOPPER) - {"rows_kernel", "rows_hopper_kernel"}
    assert all(row["copies"] > 0 for row in gathering), gathering
    assert all(row["fences"] > 0 for row in gathering), gathering


def test_older_tritons_get_a_fence_before_products_of_copied_rows():
    copy, product = "cp.async.cg.shared.global [a], [b], 0x10, 0x10;", "wgmma.fence.sync.aligned;"
    knobs = language.triton.knobs.runtime
    for code, fences in ((copy + product, 1), (product, 0), (copy, 0), (copy + "fence.proxy.async;" + product, 1)):
        stages = {"ptx": lambda source, metadata, code=code: code}
        with language._fenced():
            knobs.add_stages_inspection_hook(None, stages, None, None, 90)
        ptx = stages["ptx"]("", {})
        assert ptx.count("fence.proxy.async") == fences and (not fences or ptx.index("proxy") < ptx.index(product))
    assert knobs.add_stages_inspection_hook is None


def test_elementwise_kernels_move_16_bytes_at_a_time(hopper):
    flat = [row for row in hopper if row["name"].startswith(("gated_", "rope_"))]
    flat = [row for row in flat if not (row["name"].startswith("rope_") and row["shared"])]  # without norms
    assert len({row["name"] for row in flat}) == 4 and all(row["wide"] > 0 and row["narrow"] == 0 for row in flat), flat
    norms = [row for row in hopper if row["name"].startswith("add_norm_")]  # the weight has only 128 values here
    assert len({row["name"] for row in norms}) == 2, norms
    assert all(row["wide"] + row["copies"] > 2 >= row["narrow"] for row in norms), norms
    assert any(row["narrow"] for row in hopper if row["name"] == "count_kernel")


def test_code_is_written_to_files(written):
    rows, folder = written
    stems = [f"{i:02d}-{row['use']}" for i, row in enumerate(rows)]
    kinds = ("cubin", "ptx", "sass")
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{s}.{kind}" for s in stems for kind in kinds)
    for stem, row in zip(stems, rows, strict=True):
        ptx, sass = (folder / f"{stem}.{kind}" for kind in ("ptx", "sass"))
        assert f".entry {row['name']}" in ptx.read_text() and row["name"] in sass.read_text()
        assert ptx.read_text().count("wgmma.mma_async") == row["wgmma"]
        assert ("HGMMA" in sass.read_text()) == (row["wgmma"] > 0), stem
        assert (folder / f"{stem}.cubin").read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize(
    "words, message",
    [
        (["64,64"], "64,64"),
        (["64,64,48,8,2", "--arch=sm_75"], "arch='sm_75': use one of sm_80, "),
        (["64,64,48,8,2", "--arch=hopper"], "arch='hopper'"),
        ([], "shapes"),
        pytest.param(
            ["64,64,48,8,2"],
            "TRITON_INTERPRET='1': .*unset it",
            marks=pytest.mark.skipif(not interpreting(), reason="needs the interpreter"),
        ),
    ],
)
def test_a_mistake_names_the_remedy(words, message):
    program = pytest.importorskip("bench.compile", reason="needs triton")
    with pytest.raises(ValueError, match=message):
        program.main(words)


def test_a_mistake_is_one_line():
    out = run("64,64", check=False)
    assert out.returncode == 1 and out.stderr.startswith("error: ") and out.stderr.count("\n") == 1, out.stderr


def test_the_tiles_of_an_h100_stay():
    # Timed on an H100 (docs/LOG.md): a change of the table for other GPUs must not reach these.
    tiles = _gemm_tiles(32768 * 8, 128, 2048, 768, torch.bfloat16, 90)
    assert {name: tuple(tile) for name, tile in tiles.items()} == {
        "up": (128, 128, 64, 8, 4, 8, 4),
        "down": (128, 256, 64, 8, 2, 8, 4),
        "dswiglu": (128, 256, 64, 8, 8, 8, 4),
        "dx": (128, 256, 64, 8, 4, 8, 3),
        "dw_in": (128, 256, 64, 4, 8, 8, 4),
        "dw_out": (128, 256, 64, 4, 2, 8, 3),
    }


def test_tiles_by_the_mean_number_of_rows():
    means = {8: 16, 16: 16, 17: 32, 32: 32, 33: 128, 512: 128}
    assert means == {n: _gemm_tiles(8 * n, 8, 512, 1024, torch.bfloat16, 90)["dx"].BLOCK_M for n in means}


@pytest.mark.parametrize("capability", [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121])
def test_tiles_stay_within_the_limits_of_every_gpu(capability):
    limit = limits(capability)
    for rows in (8, 1024, 8192, 262144):
        for D, F in ((64, 48), (2048, 768), (4096, 512), (512, 1024)):
            for name, tile in _gemm_tiles(rows, 8, D, F, torch.bfloat16, capability).items():
                columns = tile.BLOCK_N * (2 if name == "up" else 1)
                assert columns <= limit.columns and tile.BLOCK_K <= limit.step and tile.num_stages <= limit.stages
                assert tile.num_stages * (tile.BLOCK_M + columns) * tile.BLOCK_K * 2 <= limit.shared


@pytest.mark.skipif(not interpreting(), reason="a GPU takes its own path")
@pytest.mark.parametrize("routing", ["random", "one", "hole"])
@pytest.mark.parametrize("D, F", [(48, 80), (32, 64)])
def test_the_layer_without_tma(D, F, routing, poison, monkeypatch):
    # Below Hopper the kernels make their descriptors from pointers: what lies outside of a matrix must not be read.
    monkeypatch.setattr(grouped_gemm, "capability", lambda: 80)
    x, w_in, w_out, gates, ids = problem(T=37, D=D, F=F, E=5, K=2, dtype=torch.float32, device="cpu", routing=routing)
    leaves = [t.requires_grad_() for t in (x, w_in, w_out, gates)]
    truth_leaves = [t.detach().double().requires_grad_() for t in leaves]
    dy = torch.randn(37, D, generator=torch.Generator().manual_seed(1))
    y, truth = moe_experts(*leaves, ids, impl="triton"), reference.experts(*truth_leaves, ids)
    check(y, truth, 1e-5, "y")
    grads, truths = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(truth, truth_leaves, dy.double())
    for name, got, want in zip(("dx", "dw_in", "dw_out", "dgates"), grads, truths, strict=True):
        check(got, want, 1e-5, name)
