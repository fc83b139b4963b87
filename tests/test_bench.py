"""bench: the formulas against hand counts, the CSV, the comparison, the checks, and the command lines on a CPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import compare, generation, kernels, layer, peers, plot, readme, step, timing
from bench import hf_layer as bench_hf
from bench.layer import powers
from bench.problem import (
    TARGETS,
    Cost,
    Shape,
    kernel_costs,
    layer_cost,
    layer_errors,
    layer_floor_ms,
    make_inputs,
    parse_shape,
    require_accuracy,
)
from bench.results import COLUMNS, append, cli, latest, read
from model import ModelConfig
from moe_kernels import moe_experts
from moe_kernels.tiles import Tile
from optimoe import config

TINY = Shape(48, 32, 16, 4, 2)
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what the benchmarks do without a GPU")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_costs_by_hand():
    costs = kernel_costs(Shape(T=10, D=16, F=32, E=3, K=2), itemsize=2)  # S = 20
    assert costs["up"] == Cost(
        2 * 20 * 64 * 16, 2 * (10 * 16 + 3 * 64 * 16 + 20 * 64 + 20 * 32)
    )  # x, w_in, pre-activation, activation
    assert costs["down"] == Cost(2 * 20 * 16 * 32, 2 * (20 * 32 + 3 * 16 * 32 + 20 * 16))
    assert costs["combine"] == Cost(0, 2 * (20 * 16 + 10 * 16))
    assert costs["dswiglu"] == Cost(
        2 * 20 * 32 * 16, 2 * (10 * 16 + 3 * 16 * 32 + 20 * 64 + 20 * 64 + 20 * 32)
    )  # dy, w_out, h; dh, ga
    assert costs["dw_out"] == Cost(2 * 20 * 16 * 32, 2 * (10 * 16 + 20 * 32 + 3 * 16 * 32))
    assert costs["dx"] == Cost(2 * 20 * 64 * 16, 2 * (20 * 64 + 3 * 64 * 16 + 20 * 16))
    assert costs["dw_in"] == Cost(2 * 20 * 64 * 16, 2 * (10 * 16 + 20 * 64 + 3 * 64 * 16))
    assert costs["route_fwd"].bytes == 2 * 10 * 3 + 8 * 20 and costs["dispatch"].bytes == 12 * 20
    assert kernel_costs(Shape(1, 16, 16, 64, 2))["down"].bytes == 2 * (
        2 * 16 + 2 * 16 * 16 + 2 * 16
    )  # only two experts are read


def test_layer_flops_and_floors():
    shape = TARGETS[0]
    for mode, factor in (("forward", 6), ("backward", 12), ("full", 18)):
        assert layer_cost(shape, mode).flops == factor * 32768 * 8 * 2048 * 768
    # 3.50 + 6.60 ms are the floors published for this shape at 798 TFLOP/s and 3.0 TB/s.
    assert layer_floor_ms(shape, "forward", 798, 3.0) == pytest.approx(3.50, abs=0.06)
    assert layer_floor_ms(shape, "backward", 798, 3.0) == pytest.approx(6.60, abs=0.06)
    assert Cost(798 * 10**9, 1).floor_ms(798, 3.0) == pytest.approx(1.0) and Cost(0, 3 * 10**9).floor_ms(
        798, 3.0
    ) == pytest.approx(1.0)


def test_parsing():
    assert parse_shape("1,2,3,4,4") == Shape(1, 2, 3, 4, 4)
    for bad in ("1,2,3,4,5", "1,2,3,4", "0,1,1,1,1", "1,2,3,4,x"):
        with pytest.raises(ValueError, match="T,D,F,E,K"):
            parse_shape(bad)
    assert (
        layer.powers("8,...,256") == [8, 16, 32, 64, 128, 256]
        and layer.powers("1,3") == [1, 3]
        and layer.powers("1,…,2") == [1, 2]
    )
    for bad in ("8,...,7", "0,...,8", "0", "8,x", ""):
        with pytest.raises(ValueError, match="such as 8,24"):
            layer.powers(bad)
    assert kernels.parse_ceilings("798,3.0") == timing.Ceilings(798, 3)
    base = Tile(128, 128, 64, 8, 2, 8, 4)
    assert kernels.parse_tile("64x256x32:g4:p1:w4:s3", base) == Tile(64, 256, 32, 4, 1, 4, 3)
    assert kernels.parse_tile("64x256x32:num_stages=5", base) == base._replace(
        BLOCK_M=64, BLOCK_N=256, BLOCK_K=32, PARTS=4, num_stages=5
    )  # parts as wide
    for bad, message in (("64x64", "BLOCK_MxBLOCK_NxBLOCK_K"), ("64x64x64:q9", "'q9' .*g .GROUP_M"), ("64x64x64:w", "'w' is not"), ("17x64x64", "powers of two"),
                         ("64x64x64:p3", "PARTS .3."), ("16x16x16:p32", "at most BLOCK_N"), ("64x64x64:g0", "at least 1")):  # fmt: skip
        with pytest.raises(ValueError, match=f"tile '{bad}': .*{message}"):
            kernels.parse_tile(bad, base)


@pytest.mark.parametrize("routing", ["softmax", "balanced", "zipf1.5"])
def test_routing_is_as_named(routing):
    shape = Shape(512, 16, 16, 8, 2)
    inputs = make_inputs(shape, torch.float32, "cpu", routing)
    assert all(len(set(row)) == 2 for row in inputs.experts_TK.tolist())
    counts = torch.bincount(inputs.experts_TK.flatten(), minlength=8)
    if routing == "balanced":
        assert (counts == 128).all()
    elif routing == "zipf1.5":
        assert counts[0] > 350 and counts[0] > counts[1] > counts[3] > counts[7]
    else:
        assert counts.min() > 90 and counts.max() < 170
    for bad in ("even", "zipf", "zipf-1"):
        with pytest.raises(ValueError, match=f"routing '{bad}': expected softmax"):
            make_inputs(shape, torch.float32, "cpu", bad)


def results_of(inputs):
    leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    y = moe_experts(*leaves, inputs.experts_TK, impl="reference")
    return {"y": y.detach()} | dict(
        zip(("dx", "dw_in", "dw_out", "dgates"), torch.autograd.grad(y, leaves, inputs.dy_TD), strict=True)
    )


def test_the_check_accepts_the_truth_and_rejects_everything_else():
    inputs = make_inputs(TINY, torch.float32, "cpu")
    good = results_of(inputs)
    assert require_accuracy(layer_errors(inputs, good), torch.float32) < 1e-6
    assert layer_errors(inputs, {"y": good["y"]}).keys() == {"y"}
    for name, tensor in good.items():
        for wrong in (torch.zeros_like(tensor), tensor.roll(1, 0), tensor * 1.001):
            with pytest.raises(ValueError, match=f"wrong result: {name}"):
                require_accuracy(layer_errors(inputs, good | {name: wrong}), torch.float32)
        with pytest.raises(ValueError, match="not finite"):
            layer_errors(inputs, good | {name: tensor.clone().fill_(float("nan"))})


def test_the_check_demands_zeros_for_experts_without_rows():
    inputs = make_inputs(Shape(3, 16, 16, 64, 1), torch.float32, "cpu")
    good = results_of(inputs)
    require_accuracy(layer_errors(inputs, good), torch.float32)
    with pytest.raises(ValueError, match="dw_out"):
        require_accuracy(layer_errors(inputs, good | {"dw_out": good["dw_out"] + 1e-3}), torch.float32)


def test_poison_reaches_new_memory():
    with timing.poisoned():
        assert torch.empty(1000).isnan().all() and torch.ones(2).new_empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


ROW = dict.fromkeys(COLUMNS) | dict(
    kernel="layer", implementation="triton", mode="full", T=8, D=16, F=32, E=4, K=2, dtype="bf16", routing="softmax"
)
ROW |= dict(
    p20_ms=0.99,
    p50_ms=1.0,
    p80_ms=1.01,
    tflops=5.5,
    gb_s=2.0,
    gpu="H100",
    torch="2",
    triton="3",
    revision="abc",
    date="today",
)


def test_csv_round_trip(tmp_path, capsys):
    path = tmp_path / "new" / "rows.csv"
    append(path, ROW)
    append(path, ROW | dict(K=1, ceiling=0.5, routing=""))
    assert read(path) == [ROW, ROW | dict(K=1, ceiling=0.5, routing="")]
    with open(path, "a") as file:
        file.write("layer,triton,full,8,16")  # an interrupted write
    append(path, ROW | dict(K=4))
    assert [row["K"] for row in read(path)] == [2, 1, 4]
    assert "line 4: left out" in capsys.readouterr().err
    append(path, ROW | dict(p50_ms=3.0))
    assert latest(read(path))[tuple(ROW[name] for name in compare.KEY)]["p50_ms"] == 3.0
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        append(tmp_path / "other.csv", ROW)


def slower(row, factor, spread=0.01):
    p50 = row["p50_ms"] * factor
    return row | dict(p20_ms=p50 * (1 - spread), p50_ms=p50, p80_ms=p50 * (1 + spread))


def test_compare_flags_only_what_is_beyond_noise(tmp_path, capsys):
    assert compare.verdict(ROW, slower(ROW, 1.05))[0] == "slower"
    assert compare.verdict(ROW, slower(ROW, 1.02, 0.001))[0] == ""  # clear of the spread, but inside the floor of 3 %
    assert compare.verdict(ROW, slower(ROW, 1.1, 0.2))[0] == ""  # beyond the floor, but inside the spread
    assert compare.verdict(ROW, slower(ROW, 0.9))[0] == "faster"
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    for path, rows in ((old, [ROW, ROW | dict(E=8)]), (new, [ROW, slower(ROW, 1.2) | dict(E=8), ROW | dict(E=16)])):
        for row in rows:
            append(path, row)
    run = subprocess.run([sys.executable, "-m", "bench.compare", str(old), str(new)], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert (
        run.stdout.count("REGRESSION") == 1 and "2 rows compared, 1 regressions; 1 rows have no baseline" in run.stdout
    )
    run = subprocess.run(
        [sys.executable, "-m", "bench.compare", "missing.csv", str(new)], capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stderr == "error: [Errno 2] No such file or directory: 'missing.csv'\n"
    assert compare.compare(read(old), read(old)) == 0
    with pytest.raises(SystemExit, match="neither a CSV file nor a git revision"):
        compare.baseline("no-such-revision", new)


def test_only_ceilings_are_nothing_measured():
    status = lambda *kernels: compare.finish(
        SimpleNamespace(compare=None), SimpleNamespace(rows=[{"kernel": k} for k in kernels]), ["x"]
    )  # noqa: E731
    assert status() == status("ceiling", "ceiling") == 1 and status("ceiling", "layer") == 0


def test_skipping_keeps_going_and_fails_on_a_broken_gpu(capsys):
    failures = []
    with timing.skipping("row", failures):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert failures == ["row: CUDA out of memory. Tried to allocate"] and "skipped row" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="undefined state"), timing.skipping("row", failures):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@cpu_only
def test_layer_and_plots_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    argv = ["--csv", str(path), "--revision", "test", "--impl", "reference"]
    assert layer.main([*argv, "--at", "32,32,16", "--experts", "4,...,16", "--topk", "1,2,4"]) == 0
    assert (
        layer.main([*argv, "--shapes", "32,32,16,4,2", "--impl", "grouped_mm", "--router", "--peers", "scattermoe"])
        == 0
    )
    out = capsys.readouterr().out
    assert "mean nothing about GPUs" in out and "peer scattermoe: scattermoe.parallel_experts does not import" in out
    rows = read(path)
    assert {(row["kernel"], row["implementation"]) for row in rows} == {
        ("ceiling", "cublas"), ("ceiling", "torch"), ("layer", "gemms"), ("layer", "reference"), ("layer", "grouped_mm"),
        ("layer+router", "grouped_mm"), ("routing", "reference"), ("routing", "torch"),
    }  # fmt: skip
    assert len({(row["E"], row["K"]) for row in rows if row["kernel"] == "layer"}) == 9
    full = next(row for row in rows if row["kernel"] == "layer" and row["mode"] == "full" and row["K"] == 2)
    assert full["tflops"] == pytest.approx(18 * 32 * 2 * 32 * 16 / full["p50_ms"] * 1e-9, rel=1e-3)
    assert layer.main([*argv, "--compare", str(path), "--shapes", "32,32,16,4,2", "--routing", "zipf1.5,softmax"]) in (
        0,
        1,
    )
    assert "rows compared" in capsys.readouterr().out

    shown = tmp_path / "as_on_a_gpu.csv"  # the figures are about triton: dress the rows up
    for row in rows:
        append(
            shown,
            row
            | dict(implementation=row["implementation"].replace("reference", "triton"), saved_mib=1.5, peak_mib=2.5),
        )
    for name, cost in kernel_costs(TINY).items():
        row = dict(kernel=name, mode="forward", tflops=cost.flops * 1e-9, gb_s=cost.bytes * 1e-6, gpu=rows[0]["gpu"])
        append(shown, ROW | row)
    assert plot.main([str(shown), "--out", str(tmp_path / "figures")]) == 0
    names = ("throughput_by_experts", "throughput_by_topk", "ceiling", "roofline", "routing", "memory")
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == set(names)


def run(code, **env):
    """Python in a process of its own: whether Triton interprets or compiles is chosen when it is imported."""
    env = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cpu_only
def test_kernels_in_the_interpreter(tmp_path):
    path, shape = tmp_path / "kernels.csv", ["--shapes", "4,16,16,2,2"]
    again = [*shape, "--kernel", "dx", "--candidates", "16x32x16:p1"]
    out = run(
        f"from bench.kernels import main; main({[*shape, '--csv', str(path)]}); main({again})", TRITON_INTERPRET="1"
    )
    assert "skipped" not in out, out
    assert [row["kernel"] for row in read(path)][2:] == list(kernels.KERNELS)
    assert out.count("dx      16x32x16") == 2 and out.count("<- today") == 4
    assert "regs" not in out and " TF " not in out  # a candidate's row has no columns that mean something on a GPU only


@cpu_only
def test_step_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "step.csv"
    flags = ["--n-layers=1", "--batch-size=2", "--seq-len=32", "--repeats=2"]
    assert step.main(["--csv", str(path), *flags]) == 0
    rows = {row["mode"]: row for row in read(path) if row["kernel"] == "step"}
    assert list(rows) == [*step.PARTS, "full"] and rows["full"]["T"] == 64 and rows["full"]["tflops"] > 0
    families, out = [row["mode"] for row in read(path) if row["kernel"] == "step-family"], capsys.readouterr().out
    for family in ("attention projections", "lm head and loss", "optimiser", "norms", "router"):
        assert family in out and any(found.startswith(family) for found in families)
    assert "% (the profiler makes a CPU's operators slower)" in out
    assert plot.main([str(path), "--out", str(tmp_path)]) == 0 and (tmp_path / "step.png").stat().st_size > 10_000


def test_parts_of_a_step():
    parts = {"experts: dw (backward)": "expert GEMMs", "experts: combine": "sort, sums, router", "router": "sort, sums, router", "attention": "attention",
             "attention projections": "projections, dense MLP", "experts: torch products": "projections, dense MLP", "embedding": "other",
             "gradient norm": "optimiser, gradient norm", "norms, rotations, elementwise": "norms, rotations, activations"}  # fmt: skip
    assert {family: plot.part_of(family) for family in parts} == parts


def test_families_of_gpu_kernels():
    cfg = step.TrainConfig(vocab_size=512, d_model=128, n_experts=8)
    of = lambda kernel, ops, sizes=(): step.family(kernel, ops, sizes, cfg, {(512, 128)})  # noqa: E731
    assert of("up_kernel", ["EagerExperts"]) == "experts: up"
    assert of("dw_kernel", ["moe_kernels::experts_bwd", "autograd::engine"]) == "experts: dw (backward)"
    assert of("route_bwd_kernel", ["moe_kernels::route_bwd"]) == "router"
    assert of("nvjet", ["aten::mm"], ([64, 128], [128, 512])) == "lm head and loss"
    assert of("nvjet", ["aten::mm", "moe_kernels::linear_cross_entropy"], ([64, 128], [128, 8])) == "lm head and loss"
    assert of("nvjet", ["aten::mm"], ([64, 128], [128, 8])) == "router"
    assert of("nvjet", ["aten::mm"], ([64, 128], [128, 384])) == "attention projections"
    assert of("pytorch_flash", ["aten::_flash_attention_forward", "aten::scaled_dot_product_attention"]) == "attention"
    assert of("multi_tensor_apply", ["aten::_fused_adamw_", "Optimizer.step#AdamW.step"]) == "optimiser"
    assert of("adamw_kernel", ["train"]) == "optimiser" and of("lpnorm", ["aten::_foreach_norm"]) == "gradient norm"
    assert of("copy", ["aten::copy_", "aten::to"], ([256, 128], [256, 128])) == "norms, rotations, elementwise"


def test_peers_say_what_is_missing():
    with pytest.raises(ValueError, match="known are scattermoe, sonicmoe, liger"):
        peers.load("megablocks")
    for name in peers.MODULES:
        with pytest.raises(ImportError, match=f"peer {name}: .* does not import"):
            peers.load(name)
    w = torch.arange(2 * 6 * 2).view(2, 6, 2)
    assert peers.interleave(w)[0, :, 0].tolist() == [0, 6, 2, 8, 4, 10] and torch.equal(
        peers.deinterleave(peers.interleave(w)), w
    )


def test_kernels_compile_ahead_without_a_gpu(tmp_path):
    code = (
        "import torch; from bench.problem import Shape; from bench.warm import compile_layer;"
        "from moe_kernels.precompile import precompile;"
        "print(precompile([lambda: compile_layer(Shape(64, 64, 64, 4, 2), torch.bfloat16), lambda: 1 / 0], capability=90))"
    )
    assert run(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "[0, 1]\n"
    assert {file.stem for file in tmp_path.rglob("*.cubin")} >= {
        "up_kernel",
        "dswiglu_kernel",
        "dw_kernel",
        "place_kernel",
        "route_bwd_kernel",
    }


@cpu_only
def test_generation_on_the_cpu(tmp_path, capsys):
    assert (
        generation.main(
            ["--csv", str(tmp_path / "g.csv"), "--impl", "cache,recompute", "--batch", "1,2", "--repeats", "1"]
        )
        == 0
    )
    rows = [row for row in read(tmp_path / "g.csv") if row["kernel"] == "generate"]
    assert [(row["T"], row["implementation"]) for row in rows] == [
        (T, name) for T in (1, 2) for name in ("cache", "recompute")
    ]
    assert all(row["p50_ms"] > 0 and row["gb_s"] > 0 for row in rows) and capsys.readouterr().out.count("tokens/s") == 4


def test_generation_cost_by_hand():
    cfg = ModelConfig(
        vocab_size=10, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4, top_k=2, d_expert=16
    )
    attention, norms, router, expert, head = 16 * 32 + 16 * 16, 32, 64, 3 * 16 * 16, 160
    always = 2 * (attention + norms + router) + 16 + head
    assert generation.step_cost(cfg, 1, 5, 2) == (
        2 * (always + 2 * 2 * expert) + 4 * 5 * 2 * 16,
        2 * (always + 2 * 2 * expert + 2 * 5 * 2 * 8),
    )
    assert generation.step_cost(cfg, 3, 5, 2).bytes == 2 * (
        always + 2 * 4 * expert + 3 * 2 * 5 * 2 * 8
    )  # all four experts


@cpu_only
def test_inside_transformers_on_the_cpu(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5")
    assert bench_hf.main(["--csv", str(tmp_path / "hf.csv"), "--impl", "moe_kernels,eager", "--layers", "1"]) == 0
    assert [row["kernel"] for row in read(tmp_path / "hf.csv")] == 4 * ["hf-block"] + 4 * ["hf-model"]
    assert "hf-model: moe_kernels is" in capsys.readouterr().out


def test_a_wrong_argument_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)
    (tmp_path / "not.csv").write_text("a,b")
    assert cli(lambda: plot.main([str(tmp_path / "not.csv")])).startswith(
        f"error: {tmp_path}/not.csv: expected the header"
    )
    assert (
        cli(lambda: plot.main([str(tmp_path / "no.csv")]))
        == f"error: [Errno 2] No such file or directory: '{tmp_path}/no.csv'"
    )
    assert cli(lambda: 1) == 1


@pytest.mark.parametrize(
    "library,main", [("matplotlib", lambda: plot.main(["x.csv"])), ("transformers", lambda: bench_hf.main([]))]
)
def test_a_missing_library_is_named_with_its_remedy(library, main, monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)
    for name in (library, "transformers.integrations.moe"):
        monkeypatch.setitem(sys.modules, name, None)
    assert library in (message := cli(main)) and message.endswith(
        {"matplotlib": "'optimoe[plot]'", "transformers": "'transformers>=5'"}[library]
    )


def test_a_csv_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)
    monkeypatch.setattr("bench.results.measure_ceilings", lambda dtype: pytest.fail("measured"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for path, message in ((tmp_path, "directory"), (tmp_path / "other.csv", "its columns are not those")):
        assert message in cli(lambda path=path: layer.main(["--csv", str(path)]))


@pytest.mark.parametrize(
    "main,argv,message",
    [
        (
            layer.main,
            "--impl foo",
            "'foo' is unknown; implementations are reference, grouped_mm, triton, peers scattermoe",
        ),
        (layer.main, "--peers foo", "'foo' is unknown"),
        (layer.main, "--routing softmax,zipf-1", "routing 'zipf-1': expected softmax"),
        (layer.main, "--experts 8,...,7", "'8,...,7': expected numbers"),
        (
            layer.main,
            "--experts 2,4 --topk 8",
            "nothing to measure: every K of [8] (--topk) is above every E of [2, 4]",
        ),
        (layer.main, "--shapes 64,32,48,4,9", "with 1 <= K <= E, such as"),
        pytest.param(layer.main, "--impl triton", "set TRITON_INTERPRET=1", marks=cpu_only),
        (kernels.main, "--ceilings 1", "'1': expected TFLOP/s and TB/s"),
        (generation.main, "--impl foo", "known are cache"),
    ],
)
def test_arguments_are_refused_with_what_is_known(main, argv, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit) as refused:
        main(argv.split())
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_figures_cut_nothing_off(tmp_path, monkeypatch):
    """With one panel the figure is narrow, with one part taking nearly all the time the others' segments are."""
    pyplot, figures = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(pyplot, "close", figures.append)
    common = dict(
        T=32768,
        D=512,
        F=1024,
        saved_mib=1.5,
        peak_mib=2.5,
        ceiling=0.5,
        gpu="NVIDIA H100 80GB HBM3",
        torch="2.11.0+cu130",
        triton="3.6.0",
    )
    kinds = [
        (name, k, mode) for mode in layer.MODES for k in (2, 4, 8) for name in ("grouped_mm", "triton", "gemms")
    ] + [("triton", 2, "full-graph")]
    rows = [dict(implementation=name, K=k, mode=mode) for name, k, mode in kinds]
    families = dict(router=1000.0, attention=30.0, optimiser=12.0)  # ms
    rows += [
        dict(kernel="step-family", implementation="dense:auto", mode=name, p50_ms=ms) for name, ms in families.items()
    ]
    for row in rows:
        append(tmp_path / "rows.csv", ROW | common | row)
    assert plot.main([str(tmp_path / "rows.csv"), "--out", str(tmp_path)]) == 0
    throughput, ceiling, _, parts = figures
    title = throughput.get_suptitle(), throughput._suptitle.get_window_extent()
    assert "experts per token" in title[0] and title[1].x0 > 0 and title[1].x1 < throughput.bbox.x1
    legend = [text.get_text() for text in ceiling.axes[0].get_legend().get_texts()]
    assert legend == ["triton", "triton, graph", "grouped_mm", "gemms"]  # as the bars stand
    assert [number.get_text() for number in parts.axes[0].texts if number.get_visible()] == [
        "31250"
    ]  # of 31250, 938 and 375 us


def test_the_readmes_benchmarks_exist(tmp_path, capsys):
    argv = ["--csv", str(tmp_path / "x.csv"), "--list"]
    assert readme.main(argv) == 0 and capsys.readouterr().out.count("python -m bench.") == len(readme.RUNS)
    assert readme.main([*argv, "--only=hf_layer"]) == 0 and capsys.readouterr().out.count("\n") == 1
    for run in readme.RUNS:
        assert (Path(readme.__file__).parent / f"{run.kind}.py").exists()
        if run.kind == "step":
            cfg = config.parse(
                step.TrainConfig, [word for word in run.arguments.split() if not word.startswith("--repeats")]
            )
            assert cfg.optimizer == "adamw" and cfg.batch_size in (8, 16, 20, 32, 64)
    shapes = [
        powers(word.partition("=")[2])
        for run in readme.RUNS
        for word in run.arguments.split()
        if word.startswith(("--experts", "--topk"))
    ]
    assert shapes == [[8, 16, 32, 64, 128, 256], [2, 8], [8, 16, 32, 64, 128, 256], [1, 2, 4, 8, 16]]
    if not torch.cuda.is_available():
        assert readme.main(argv[:2]).startswith("error: these sizes need a GPU")
