"""bench: training steps, generation, and the figures. Run: python -m pytest tests/test_bench_step.py (CPU)"""

import pytest

from bench import generation, plot, step
from bench.rows import append, read
from model import ModelConfig
from moe_kernels import dispatch, grouped_gemm, hopper, hopper_gated, hopper_rows
from tests.test_bench import ROW, cpu_only


@cpu_only
def test_step_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "step.csv"
    assert step.main([f"--csv={path}", "--n_layers=1", "--batch_size=2", "--seq_len=32", "--repeats=2"]) == 0
    rows = {row["mode"]: row for row in read(path) if row["kernel"] == "step"}
    assert list(rows) == [*step.PARTS, "full"] and rows["full"]["T"] == 64 and rows["full"]["tflops"] > 0
    families, out = [row["mode"] for row in read(path) if row["kernel"] == "step-family"], capsys.readouterr().out
    for family in ("attention projections", "lm head and loss", "optimiser", "norms", "router"):
        assert family in out and any(found.startswith(family) for found in families)
    assert "% (the profiler makes a CPU's operators slower)" in out
    assert plot.main([str(path), f"--out={tmp_path}"]) == 0 and (tmp_path / "step.png").stat().st_size > 10_000


def test_parts_of_a_step():
    parts = {
        "experts: dw (backward)": "expert GEMMs",
        "experts: combine": "sort, sums, router",
        "router": "sort, sums, router",
        "attention": "attention",
        "attention projections": "projections, dense MLP",
        "experts: torch products": "projections, dense MLP",
        "embedding": "other",
        "gradient norm": "optimiser, gradient norm",
        "norms, rotations, elementwise": "norms, rotations, activations",
    }
    assert {family: plot.part_of(family) for family in parts} == parts


def test_every_kernel_of_the_experts_has_a_family():
    names = {name for module in (dispatch, grouped_gemm, hopper, hopper_gated, hopper_rows) for name in vars(module)}
    assert step.EXPERT_KERNELS == {name for name in names if name.endswith("_kernel")}
    for name in step.EXPERT_OPS:
        assert plot.part_of(f"experts: {name}") in ("expert GEMMs", "sort, sums, router")


def test_families_of_gpu_kernels():
    cfg = step.TrainConfig(vocab_size=512, d_model=128, n_experts=8)
    of = lambda kernel, ops, sizes=(): step.family(kernel, ops, sizes, cfg)
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


@cpu_only
def test_generation_on_the_cpu(tmp_path, capsys):
    """Its defaults fit a CPU."""
    assert generation.main([f"--csv={tmp_path / 'g.csv'}", "--repeats=1"]) == 0
    rows = [row for row in read(tmp_path / "g.csv") if row["kernel"] == "generate"]
    assert [(row["T"], row["D"]) for row in rows] == [(1, 128), (4, 128)]
    assert all(row["p50_ms"] > 0 and row["gb_s"] > 0 for row in rows)
    assert capsys.readouterr().out.count("tokens/s") == 2


def test_generation_cost_by_hand():
    cfg = ModelConfig(
        vocab_size=10, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4, top_k=2, d_expert=16
    )
    attention, norms, router, expert, head = 16 * 32 + 16 * 16, 32, 64, 3 * 16 * 16, 160
    always = 2 * (attention + norms + router) + 16 + head
    flops, read = 2 * (always + 2 * 2 * expert) + 4 * 5 * 2 * 16, always + 2 * 2 * expert + 2 * 5 * 2 * 8
    assert generation.step_cost(cfg, 1, 5, 2) == (flops, 2 * read)
    all_experts = always + 2 * 4 * expert + 3 * 2 * 5 * 2 * 8
    assert generation.step_cost(cfg, 3, 5, 2).bytes == 2 * all_experts


def test_figures_cut_nothing_off(tmp_path, monkeypatch):
    """With one panel the figure is narrow, with one part taking nearly all the time the others' segments are."""
    pyplot, figures = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(pyplot, "close", figures.append)
    common = dict(T=32768, D=512, F=1024, gpu="NVIDIA H100 80GB HBM3", torch="2.11.0+cu130", triton="3.6.0")
    kinds = [(name, e, "full") for e in (2, 4, 8) for name in ("grouped_mm", "triton", "gemms")]
    kinds.append(("triton", 2, "full-graph"))
    rows = [common | dict(implementation=name, E=e, mode=mode) for name, e, mode in kinds]
    rows += [common | dict(implementation="triton", E=4, K=k, mode="full") for k in (1, 4)]
    rows = [row | dict(ceiling=None if row["implementation"] == "gemms" else 0.5) for row in rows]
    families = dict(router=1000.0, attention=30.0, optimiser=12.0)  # ms
    dense = dict(kernel="step-family", implementation="dense:auto")
    rows += [common | dense | dict(mode=name, p50_ms=ms) for name, ms in families.items()]
    earlier = common | dense | dict(mode="experts: old name", p50_ms=9.0, revision="old", date="before")
    old_peer = common | dict(implementation="sonicmoe", E=2, mode="full", ceiling=0.9, revision="old", date="before")
    append(tmp_path / "rows.csv", *(ROW | row for row in [earlier, old_peer, *rows]))
    assert plot.main([str(tmp_path / "rows.csv"), f"--out={tmp_path}"]) == 0
    *throughputs, ceiling, parts = figures
    for throughput, name, ticks in zip(throughputs, ("experts E", "experts per token K"), ("248", "124"), strict=True):
        title = throughput.get_suptitle(), throughput._suptitle.get_window_extent()
        assert f"number of {name}\n" in title[0] and title[1].x0 > 0 and title[1].x1 < throughput.bbox.x1
        assert "".join(tick.get_text() for tick in throughput.axes[0].get_xticklabels()) == ticks
    legend = [text.get_text() for text in ceiling.axes[0].get_legend().get_texts()]
    assert legend == ["triton", "triton, graph", "grouped_mm"]  # as the bars stand, of the newest revision of a shape
    assert [number.get_text() for number in parts.axes[0].texts] == ["31250"]  # of 31250, 938 and 375 us
