"""bench: the formulas against hand counts, the CSV, the checks, and the command lines on a CPU."""

import csv
import json
import os
import stat
import subprocess
import sys

import pytest
import torch

from bench import counters, generation, kernels, layer, node, peers, plot, readme, step, timing
from bench.problem import (
    TARGETS,
    Cost,
    Shape,
    kernel_costs,
    layer_cost,
    layer_errors,
    make_inputs,
    parse_shape,
    require_accuracy,
)
from bench.rows import COLUMNS, KEY, BenchConfig, Ceilings, Results, append, latest, read
from moe_kernels import grouped_gemm, moe_experts
from optimoe import config
from tests.trainrun import free_port

TINY = Shape(48, 32, 16, 4, 2)
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what the benchmarks do without a GPU")


def mistake(main, argv):
    """The line with which a program ends."""
    with pytest.raises(SystemExit) as stop:
        config.command_line(lambda: main(argv))
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    return str(stop.value)


def test_costs_by_hand():
    costs = kernel_costs(Shape(T=10, D=16, F=32, E=3, K=2), itemsize=2)  # S = 20
    x, w_in, h, a = 10 * 16, 3 * 64 * 16, 20 * 64, 20 * 32
    assert costs["up"] == Cost(2 * 20 * 64 * 16, 2 * (x + w_in + h + a))
    assert costs["down"] == Cost(2 * 20 * 16 * 32, 2 * (20 * 32 + 3 * 16 * 32 + 20 * 16))
    assert costs["combine"] == Cost(0, 2 * (20 * 16 + 10 * 16))
    dy, w_out, dh, ga = 10 * 16, 3 * 16 * 32, 20 * 64, 20 * 32
    assert costs["dswiglu"] == Cost(2 * 20 * 32 * 16, 2 * (dy + w_out + h + dh + ga))
    assert costs["dw_out"] == Cost(2 * 20 * 16 * 32, 2 * (10 * 16 + 20 * 32 + 3 * 16 * 32))
    assert costs["dx"] == Cost(2 * 20 * 64 * 16, 2 * (20 * 64 + 3 * 64 * 16 + 20 * 16))
    assert costs["dw_in"] == Cost(2 * 20 * 64 * 16, 2 * (10 * 16 + 20 * 64 + 3 * 64 * 16))
    assert costs["route_fwd"].bytes == 2 * 10 * 3 + 8 * 20 and costs["dispatch"].bytes == 12 * 20
    only_two_experts = kernel_costs(Shape(1, 16, 16, 64, 2))
    assert only_two_experts["down"].bytes == 2 * (2 * 16 + 2 * 16 * 16 + 2 * 16)


def test_layer_flops_and_floors():
    shape = TARGETS[0]
    for mode, factor in (("forward", 6), ("backward", 12), ("full", 18)):
        assert layer_cost(shape, mode).flops == factor * 32768 * 8 * 2048 * 768
    assert Cost(798 * 10**9, 1).floor_ms(798, 3.0) == pytest.approx(1.0)
    assert Cost(0, 3 * 10**9).floor_ms(798, 3.0) == pytest.approx(1.0)


def test_parsing():
    assert parse_shape("1,2,3,4,4") == Shape(1, 2, 3, 4, 4)
    for bad in ("1,2,3,4,5", "1,2,3,4", "0,1,1,1,1", "1,2,3,4,x"):
        with pytest.raises(ValueError, match="T,D,F,E,K"):
            parse_shape(bad)


@pytest.mark.parametrize("routing", ["softmax", "zipf1.5"])
def test_routing_is_as_named(routing):
    shape = Shape(512, 16, 16, 8, 2)
    inputs = make_inputs(shape, torch.float32, "cpu", routing)
    assert all(len(set(row)) == 2 for row in inputs.experts_TK.tolist())
    counts = torch.bincount(inputs.experts_TK.flatten(), minlength=8)
    if routing == "zipf1.5":
        assert counts[0] > 350 and counts[0] > counts[1] > counts[3] > counts[7]
    else:
        assert counts.min() > 90 and counts.max() < 170


def results_of(inputs):
    leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    y = moe_experts(*leaves, inputs.experts_TK, impl="reference")
    grads = torch.autograd.grad(y, leaves, inputs.dy_TD)
    return {"y": y.detach()} | dict(zip(("dx", "dw_in", "dw_out", "dgates"), grads, strict=True))


def test_the_check_accepts_the_truth_and_rejects_everything_else():
    inputs = make_inputs(TINY, torch.float32, "cpu")
    good = results_of(inputs)
    assert require_accuracy(layer_errors(inputs, good), torch.float32) < 1e-6

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


def test_implementations_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "repeat", lambda fn, seconds: order.append(fn()) or [1.0, 2.0, 3.0])
    assert timing.times_in_turn({"a": lambda: "a", "b": lambda: "b"})["b"].p50 == 2.0
    assert order == ["a", "b"] * (4 if torch.cuda.is_available() else 1)


ROW = dict.fromkeys(COLUMNS) | dict(kernel="layer", implementation="triton", mode="full", T=8, D=16, F=32, E=4, K=2)
ROW |= dict(dtype="bf16", routing="softmax", p20_ms=0.99, p50_ms=1.0, p80_ms=1.01, tflops=5.5, gb_s=2.0)
ROW |= dict(gpu="H100", torch="2", triton="3", revision="abc", date="today")


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
    assert latest(read(path))[tuple(ROW[name] for name in KEY)]["p50_ms"] == 3.0
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        append(tmp_path / "other.csv", ROW)
    append(tmp_path / "zero.csv", ROW | dict(T=0))  # plots divide by it
    assert read(tmp_path / "zero.csv") == [] and "line 2: left out" in capsys.readouterr().err


def test_only_ceilings_are_nothing_measured():
    run = Results(BenchConfig(revision="test"))
    ceiling, gemms, ours = (("ceiling", "torch"), ("layer", "gemms"), ("layer", "triton"))
    for kinds, status in (([], 1), ([ceiling, ceiling], 1), ([ceiling, gemms], 1), ([ceiling, gemms, ours], 0)):
        run.rows = [dict(kernel=kernel, implementation=name) for kernel, name in kinds]
        assert run.finish(["x"]) == status


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
    flags = [f"--csv={path}", "--revision=test"]
    shapes = [f"32,32,16,{E},2" for E in (4, 8, 16)]
    assert layer.main([*flags, *shapes, "--impl=reference,grouped_mm", "--peers=sonicmoe"]) == 0
    out = capsys.readouterr().out
    assert "mean nothing about GPUs" in out
    assert "peer sonicmoe: sonicmoe does not import" in out
    rows = read(path)
    found = {(row["kernel"], row["implementation"]) for row in rows if row["kernel"] != "ceiling"}
    assert found == {("layer", name) for name in ("gemms", "reference", "grouped_mm")}
    assert {row["E"] for row in rows if row["kernel"] == "layer"} == {4, 8, 16}
    full = next(row for row in rows if row["implementation"] == "reference" and row["mode"] == "full")
    assert full["tflops"] == pytest.approx(18 * 32 * 2 * 32 * 16 / full["p50_ms"] * 1e-9, rel=1e-3)
    assert full["python_ms"] > 0 and full["ceiling"] > 0
    assert layer.main([*flags, "--impl=reference", shapes[0], "--routing=zipf1.5,softmax"]) == 0
    assert {row["routing"] for row in read(path)[len(rows) :]} == {"", "zipf1.5", "softmax"}

    shown = tmp_path / "as_on_a_gpu.csv"  # the figures are about triton: dress the rows up
    append(shown, *(row | dict(implementation=row["implementation"].replace("reference", "triton")) for row in rows))
    assert plot.main([str(shown), f"--out={tmp_path / 'figures'}"]) == 0
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"throughput_by_experts", "ceiling"}
    append(shown, ROW)
    for flags in ([], ["--gpu=B200"]):
        assert f"must fit one of: {rows[0]['gpu']}, H100" in mistake(plot.main, [str(shown), *flags])


@cpu_only
def test_traces_on_the_cpu(tmp_path, capsys):
    shape, path = "32,32,16,4,2", tmp_path / "new" / "trace.json"
    assert layer.main([shape, "--impl=reference", f"--trace={path}"]) == 0
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {f"{shape} gemms", f"{shape} reference", "aten::bmm"} <= names
    assert step.main(["--n_layers=1", "--batch_size=1", "--seq_len=16", f"--trace={path}"]) == 0
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"step", *step.PARTS} <= names
    for bad, message in (("/proc/x.json", "nothing can be written to /proc"), (tmp_path, "this is a directory")):
        capsys.readouterr()
        for main in layer.main, step.main:
            assert message in mistake(main, [f"--trace={bad}"])
        assert not capsys.readouterr().out  # nothing has been built


def run(code, **env):
    """Python in a process of its own: whether Triton interprets or compiles is chosen when it is imported."""
    env = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cpu_only
def test_kernels_in_the_interpreter(tmp_path, capsys, monkeypatch):
    path, argv = tmp_path / "kernels.csv", ["4,16,16,2,2"]
    monkeypatch.setattr(timing, "repeat", lambda fn, seconds: [1.0])
    assert kernels.main([*argv, f"--csv={path}"]) == 0 and "skipped" not in capsys.readouterr().out
    assert [row["kernel"] for row in read(path)][2:] == list(kernels.KERNELS)
    # The layer is checked with the very launches that are timed: a wrong one gets no row.
    dw = grouped_gemm.dw
    monkeypatch.setattr(grouped_gemm, "dw", lambda *args: dw(*args) * 1.001)
    assert kernels.main([*argv, "--kernel=up"]) == 1
    assert "wrong result: dw" in capsys.readouterr().out


HEADINGS = """ID|Kernel Name|gpu__time_duration.sum
sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active
lts__throughput.avg.pct_of_peak_sustained_elapsed|gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed
sm__inst_issued.avg.pct_of_peak_sustained_active|sm__warps_active.avg.pct_of_peak_sustained_active
launch__registers_per_thread|launch__shared_mem_per_block_dynamic|launch__shared_mem_per_block_static
smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio
smsp__average_warps_issue_stalled_long_scoreboard_not_issued_per_issue_active.ratio
smsp__average_warps_issue_stalled_wait_per_issue_active.ratio
smsp__average_warps_issue_stalled_selected_per_issue_active.ratio
smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio""".replace("\n", "|")
COUNTED = [
    HEADINGS,
    "||ns|%|%|%|%|%|||||||||",
    "0|vectorized_elementwise_kernel|5|0|0|0|0|0|0|0|0|0|0|0|0|0",
    "1|up_kernel|1,250,000|46.1|55|48|20|12.5|255|197632|0|4.3|4.1|2.5|1|0.5",
]
COUNTED = "==PROF== Connected\n" + "\n".join('"' + line.replace("|", '","') + '"' for line in COUNTED)


def test_counters_are_read_from_ncus_table():
    (row,) = counters.parse(COUNTED, [["up", "up_kernel"]])
    want = {"kernel": "up", "function": "up_kernel", "us": "1250", "tensor %": "46.1", "L2 %": "55", "DRAM %": "48"}
    want |= {"issue %": "20", "warps %": "12.5", "registers": "255", "shared": "197632"}
    assert row == want | {"stalls": "long_scoreboard 4.3, wait 2.5 of 7.3"}
    with pytest.raises(ValueError, match="counted 1 kernels, 2 were launched"):
        counters.parse(COUNTED, [["up", "up_kernel"], ["down", "up_kernel"]])
    with pytest.raises(ValueError, match="no table: nothing"):
        counters.parse("nothing", [])


def test_counters_stand_beside_the_roofline_and_go_to_a_file(tmp_path):
    shape, machine = Shape(65536, 512, 1024, 64, 4), Ceilings(700.0, 3.0)
    parsed = counters.parse(COUNTED, [["up", "up_kernel"]])
    rows = counters.beside_roofline(parsed, shape, machine)
    floor_us = 1e6 * 4 * 65536 * 4 * 512 * 1024 / 700e12  # its products need longer than its bytes
    assert float(rows[0]["roofline"]) == pytest.approx(floor_us / 1250, abs=1e-3)
    path = tmp_path / "c.csv"
    for _ in range(2):
        counters.append(path, rows)
    header, *lines = csv.reader(path.read_text().splitlines())
    assert header == list(rows[0]) and lines == 2 * [list(rows[0].values())]
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="its columns are not those of --counters"):
        counters.append(path, rows)
    assert path.read_text() == "a,b\n"


@cpu_only
def test_counters_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["4,16,16,2,2", "--counters"]
    assert "install it and put it on the PATH" in mistake(kernels.main, argv)
    (tmp_path / "ncu").write_text("#!/bin/sh\n")
    (tmp_path / "ncu").chmod(stat.S_IRWXU)
    assert "needs an NVIDIA GPU" in mistake(kernels.main, argv)


@cpu_only
@pytest.mark.parametrize("engine", ["ddp", "ep"])
def test_node_on_two_ranks(engine, tmp_path):
    port = free_port()
    flags = ["--n_layers=1", "--batch_size=1", "--seq_len=16", "--repeats=2", f"--parallel={engine}"]
    flags.append(f"--csv={tmp_path / 'node.csv'}")
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-m", "bench.node", *flags],
        env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
        text=True,
        stdout=subprocess.PIPE,
    )
    ranks = [start(0), start(1)]
    outs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0] and outs[1] == ""
    rows = read(tmp_path / "node.csv")
    assert [(row["implementation"], row["mode"], row["T"]) for row in rows] == [("one GPU", "1", 16), (engine, "2", 16)]
    assert rows[1]["share"] > 0 and rows[1]["gb_s"] > 0 and rows[0]["share"] is None and "the slowest" in outs[0]


def test_exposed_communication():
    kernels_ = [("gemm", 0, 1000), ("ncclAllReduce", 500, 2000), ("gemm", 1500, 1700), ("gemm", 2500, 2600)]
    assert node.communication(kernels_) == (1.5, 0.8)
    assert node.communication([]) == (0, 0)


def test_peers_say_what_is_missing():
    for name in ("sonicmoe", "liger"):
        with pytest.raises(ImportError, match=f"peer {name}: .* does not import .*; it comes from .*http"):
            peers.load(name)
    w = torch.arange(2 * 6 * 2).view(2, 6, 2)
    assert peers.interleave(w)[0, :, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert torch.equal(peers.deinterleave(peers.interleave(w)), w)


@cpu_only
def test_a_peer_with_a_layout_of_its_own(tmp_path, capsys, monkeypatch):
    """A stand-in, because no peer runs on a CPU: its weights are interleaved, and so is their gradient."""

    def experts(x, w_in, w_out, gates, experts):
        return moe_experts(x, peers.deinterleave(w_in), w_out, gates, experts, impl="reference")

    argv = ["32,32,16,4,2", "--impl=reference", "--peers=liger", f"--csv={tmp_path / 'rows.csv'}"]
    monkeypatch.setattr(peers, "load", lambda name: peers.Peer(experts, peers.interleave, peers.deinterleave))
    assert layer.main(argv) == 0
    out = capsys.readouterr().out
    assert "skipped" not in out and "liger: its own tuner" in out
    assert "liger" in {row["implementation"] for row in read(tmp_path / "rows.csv")}
    monkeypatch.setattr(peers, "load", lambda name: peers.Peer(experts, peers.interleave))
    assert layer.main(argv) == 0 and "wrong result: dw_in" in capsys.readouterr().out


def test_kernels_compile_ahead_without_a_gpu(tmp_path):
    code = (
        "import torch; from bench.problem import Shape, compile_layer; from moe_kernels.precompile import precompile;"
        "tasks = [lambda: compile_layer(Shape(64, 64, 64, 4, 2), torch.bfloat16), lambda: 1 / 0];"
        "print(precompile(tasks, capability=90))"
    )
    assert run(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "[0, 1]\n"
    kernels_ = {file.stem for file in tmp_path.rglob("*.cubin")}
    assert kernels_ >= {"up_kernel", "dswiglu_kernel", "dw_kernel", "place_kernel", "route_bwd_kernel"}


def test_a_wrong_argument_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "not.csv").write_text("a,b")
    message = mistake(plot.main, [str(tmp_path / "not.csv")])
    assert message.startswith(f"error: {tmp_path}/not.csv: its columns are")
    message = mistake(plot.main, [str(tmp_path / "no.csv")])
    assert message.endswith(f"No such file or directory: '{tmp_path}/no.csv'")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert mistake(plot.main, ["x.csv"]).endswith(": pip install -e '.[plot]'")


def test_a_csv_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.rows.times_ms", lambda fn: pytest.fail("measured"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    refused = (
        (tmp_path, f"csv='{tmp_path}': this is a directory"),
        ("/proc/x/y.csv", "csv='/proc/x/y.csv': nothing can"),
    )
    for path, message in (*refused, (tmp_path / "other.csv", "its columns are not those")):
        assert message in mistake(layer.main, [f"--csv={path}"])
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    "main,argv,message",
    [
        (layer.main, "--impl=foo", "impl='foo': use one of reference, grouped_mm, triton"),
        (layer.main, "--peers=foo", "peers='foo': use one of sonicmoe, liger"),
        (layer.main, "--routing=softmax,zipf-1", "routing='zipf-1': use one of softmax, zipf1.5"),
        (layer.main, "64,32,48,4,9", "with 1 <= K <= E, such as"),
        pytest.param(layer.main, "--impl=triton", "TRITON_INTERPRET=1", marks=cpu_only),
        pytest.param(kernels.main, "", "with TRITON_INTERPRET=1 Triton's interpreter", marks=cpu_only),
        (kernels.main, "--kernel=foo", "kernel='foo': use one of route_fwd"),
        (kernels.main, "1,2,3", "shape '1,2,3': expected T,D,F,E,K"),
        (step.main, "--frobnicate=1", "unknown field 'frobnicate'"),
        (step.main, "--repeats=0", "repeats=0: use 1 or more"),
        (step.main, "--resume=runs/x", "resume='runs/x': random weights are timed; use --config=RUN/config.json"),
        (step.main, "--n_layers=1000000", "GiB of memory or more"),
        (generation.main, "--preset=foo", "preset='foo': use tiny or paper-"),
        (generation.main, "--repeats=0", "repeats=0: use 1 or more"),
        (generation.main, "--new=0", "new=0: use 1 or more"),
        (generation.main, "--prompt=5000000", "prompt=5000000: use 2,097,152 or less"),
        (generation.main, "--batches=4,0", "batches=(4, 0): use 1 or more"),
        pytest.param(layer.main, "--graph", "graph=True: CUDA graphs need a GPU", marks=cpu_only),
        pytest.param(kernels.main, "--once", "once=True: Nsight Compute counts on a GPU", marks=cpu_only),
        pytest.param(step.main, "--device=cuda", "device='cuda': the step runs on", marks=cpu_only),
        pytest.param(step.main, "--impl=triton", "impl='triton' needs a CUDA GPU", marks=cpu_only),
        pytest.param(readme.main, "", "need a GPU; use --list", marks=cpu_only),
    ],
)
def test_arguments_are_refused_with_what_is_known(main, argv, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert message in mistake(main, argv.split())


def test_a_part_of_torchruns_environment_is_one_line(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        assert f"{name}=None: start it by torchrun" in mistake(node.main, [])
        monkeypatch.setenv(name, "x")
    assert "RANK='x': torchrun sets it" in mistake(node.main, [])


@cpu_only
def test_small_sizes_give_way_to_those_of_a_file(tmp_path):
    (tmp_path / "config.json").write_text('{"batch_size": 5, "n_layers": 1}')
    assert step.parse([f"--config={tmp_path}/config.json"], "").batch_size == 5 != step.parse([], "").batch_size


def test_the_readmes_benchmarks_exist(capsys):
    """Every command of bench.readme is understood by its program."""
    assert readme.main(["--csv=x.csv", "--list"]) == 0
    commands = [line.split()[2:] for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == len(readme.RUNS.strip().splitlines()) > 10
    configs = dict(step=step.StepConfig, layer=layer.Config, kernels=kernels.Config, generation=generation.Config)
    for module, *flags in commands:
        flags = [flag for flag in flags if torch.cuda.is_available() or flag != "--impl=triton"]
        assert config.parse(configs[module.removeprefix("bench.")], flags).csv == "x.csv"
