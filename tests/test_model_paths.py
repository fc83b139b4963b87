"""One model by several ways: implementations, recomputation, compiled blocks, documents, devices.

Run: python -m pytest tests/test_model_paths.py (CPU; more on a GPU)"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import model as model_file
from model import GPT, ModelConfig, compute_dtype, update_router_bias
from optimoe import load
from optimoe.load import pick_device
from optimoe.sizes import training_memory
from tests.checks import check, rms_ratio
from tests.test_model import OPTIONS, SMALL, make, ratio, tokens


def step(model, x, y):
    """(loss and gradients of a training step, bytes that autograd keeps for the backward pass beside the weights)"""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(x, y)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    (out.loss + 1e-2 * out.balance + 1e-3 * out.z).backward()
    found = {"loss": out.loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    return found, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"impl": "triton"}, {"dense": True, "impl": "reference"}], ids=str)
def test_recomputation_changes_memory_and_no_bit(options, compiled, device):
    """Of what the backward pass keeps, experts lose the pre-activation, and blocks all but their inputs. Inductor
    compiles other kernels for each choice on a GPU, and they round otherwise."""
    if options.get("impl") == "triton" and compiled and device == "cpu":
        pytest.skip("the interpreter is slow")
    results, sizes_ = {}, {}
    small = dict(n_layers=1, d_expert=32) if options.get("impl") == "triton" else {}  # the interpreter is slow
    for choice in ("none", "blocks") if "dense" in options else ("none", "experts", "blocks"):
        torch._dynamo.reset()
        model = make(recompute=choice, **options | small).to(device)
        for block in model.blocks if compiled else ():
            block.compile(fullgraph=True, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
        shape = (1, 5) if small else (2, 10)
        x, y = tokens(*shape).to(device), tokens(*shape, seed=2).to(device)
        results[choice], sizes_[choice] = step(model, x, y)
    for choice, found in results.items():
        for name, t in found.items():
            fused = compiled and device == "cuda"
            same = rms_ratio(t, results["none"][name]) < 1.2e-2 if fused else torch.equal(t, results["none"][name])
            assert same, (choice, name)
    assert list(sizes_.values()) == sorted(set(sizes_.values()), reverse=True), sizes_
    cfgs = [ModelConfig(**SMALL | options | {"recompute": choice}) for choice in results]
    estimates = [training_memory(cfg, 20)["activations (estimate)"] for cfg in cfgs]
    assert estimates == sorted(set(estimates), reverse=True)


def test_a_dense_model_has_no_experts_to_compute_again():
    with pytest.raises(ValueError, match="recompute='experts': a dense model has no experts: use blocks"):
        make(dense=True, recompute="experts")


@pytest.mark.parametrize("impl", ["grouped_mm", "triton"])
def test_implementations_agree_on_a_training_step(impl, device):
    """On the GPU in bfloat16; on the CPU in float32, the Triton kernels in their interpreter."""
    dtype, bound = ("bfloat16", 3e-2) if device == "cuda" else ("float32", 1e-5)
    results = []
    for choice in ("reference", impl):
        model = make(impl=choice, dtype=dtype, n_shared_experts=1).to(device)
        out = model(tokens(1, 10).to(device), tokens(1, 10, seed=2).to(device))
        (out.loss + 1e-2 * out.balance + 1e-3 * out.z).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({"loss": out.loss.detach(), "counts": out.counts_NE} | gradients)
    for name, expected in results[0].items():
        assert ratio(results[1][name], expected) < bound, name
        assert ratio(results[1][name] * 0.9, expected) > bound  # the check can fail


def test_bfloat16_compute_keeps_float32_weights_and_statistics():
    full, half = make(), make(dtype="bfloat16")
    x, y = tokens(), tokens(seed=2)
    out = half(x, y)
    assert half(x).logits.dtype == torch.bfloat16
    assert out.loss.dtype == out.balance.dtype == out.z.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert abs(out.loss.item() - full(x, y).loss.item()) < 0.05
    norm = half.norm
    x = (torch.randn(4, 32) * 100).bfloat16()
    expected = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert ratio(norm(x), expected) < 4e-3  # one rounding to bfloat16, not a sum of squares in it


@pytest.mark.parametrize("name", ["default", "everything", "dense"])
def test_compiles_as_one_graph(name, device):
    """With inductor on a GPU; on the CPU aot_eager captures the same graphs without the minutes of a C++ compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Exact enough to show a wrong graph; test_train.py compiles in bfloat16. Little: the interpreter is slow.
    options = dict(impl="triton", dtype="float32", n_layers=1, d_expert=32, **OPTIONS[name])
    models = [make(**options).to(device) for _ in range(2)]
    backend = "inductor" if device == "cuda" else "aot_eager"
    run = torch.compile(models[1], backend=backend, fullgraph=True, dynamic=False)
    x, y = tokens(1, 4).to(device), tokens(1, 4, seed=2).to(device)
    for call in (models[0], run):
        out = call(x, y)
        (out.loss + 1e-2 * out.balance + 1e-3 * out.z).backward()
    for a, b in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert ratio(a.grad, b.grad) < (1e-4 if device == "cuda" else 1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_triton_path_reads_no_value_back(monkeypatch):
    """A step on tensors that have shapes but no values: an .item(), which on a GPU would wait for the device,
    raises."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the triton path take CPU tensors; no kernel runs
    with FakeTensorMode():
        for options in OPTIONS.values():
            model, x = make(impl="triton", **options), torch.zeros(2, 8, dtype=torch.long)
            out = model(x, x)
            (out.loss + out.balance + out.z).backward()
            update_router_bias(model, out.counts_NE)
        with pytest.raises(DataDependentOutputException):  # the check can fail
            out.loss.item()


def test_devices(monkeypatch):
    """mps is taken where torch has it and only when it is asked for; it computes in float32."""
    cfg = SimpleNamespace(device="mps", dtype="auto", impl="reference")
    for present in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda present=present: present)
        assert pick_device(SimpleNamespace(**vars(cfg) | {"device": "cpu"})).type == "cpu"
        if not torch.cuda.is_available():
            assert pick_device(SimpleNamespace(**vars(cfg) | {"device": "auto"})).type == "cpu"
            with pytest.raises(ValueError, match="device='cuda': no CUDA device"):
                pick_device(SimpleNamespace(**vars(cfg) | {"device": "cuda"}))
        if not present:
            with pytest.raises(ValueError, match="device='mps': no MPS device"):
                pick_device(cfg)
    assert compute_dtype(ModelConfig(), torch.device("mps")) == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="it pretends to have two GPUs; test_parallel.py starts real ones")
def test_a_rank_makes_its_gpu_the_current_one_before_kernels_are_chosen(monkeypatch):
    """Kernels run on the current device only, so the second rank's choice would be refused."""
    current = [0]

    def choose(impl, tensor):
        assert current[-1] == tensor.device.index

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setattr(load, "pick_impl", choose)
    with FakeTensorMode():  # tensors on a GPU that is not there
        assert pick_device(SimpleNamespace(device="cuda", dtype="float32", impl="auto"), 1).index == 1
    assert current == [0, 1]
    with pytest.raises(ValueError, match="LOCAL_RANK=2: 2 GPUs are visible; use at most as many ranks"):
        pick_device(SimpleNamespace(device="cuda", dtype="float32", impl="auto"), 2)


def documents(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]


@pytest.mark.parametrize("impl", ["reference", "grouped_mm"])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_nothing_of_a_document_reaches_another(impl, n_kv_heads):
    gpt = GPT(ModelConfig(**{**SMALL, "n_kv_heads": n_kv_heads, "impl": impl, "seq_len": 32}))
    x, doc_ids = tokens(2, 32), torch.cat([documents(10, 1, 21), documents(3, 29)])
    logits = gpt(x, doc_ids_BL=doc_ids).logits
    for row, number in ((0, 0), (0, 2), (1, 1)):
        others = x.where((doc_ids == number) & (torch.arange(2) == row)[:, None], (x + 7) % 61)
        at = row, doc_ids[row] == number
        torch.testing.assert_close(gpt(others, doc_ids_BL=doc_ids).logits[at], logits[at], rtol=0, atol=1e-6)
        alone = gpt(x[row][None, at[1]]).logits[0]
        torch.testing.assert_close(alone, logits[at], rtol=1e-5, atol=1e-5)
    seen = gpt(x).logits  # the check can fail
    assert torch.equal(seen[0, :10], logits[0, :10]) or (seen[0, :10] - logits[0, :10]).abs().max() < 1e-6
    assert (seen[0, 10:] - logits[0, 10:]).abs().max() > 1e-2


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_what_a_gpu_runs_is_the_same(n_kv_heads, monkeypatch):
    """flex_attention alone and within a compiled block, which is compiled once for all documents. A CPU has no backward
    pass of it; on a GPU, gradients too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = ModelConfig(**{**SMALL, "seq_len": 200, "head_dim": 16, "n_kv_heads": n_kv_heads})
    gpt, make = GPT(cfg).to(device), model_file.document_mask
    batches = [torch.cat([documents(150, 1, 49), documents(*lengths)]).to(device) for lengths in ((70, 130), (9, 191))]
    x = tokens(2, 200).to(device)

    def run():
        with torch.set_grad_enabled(device == "cuda"):
            out = [gpt(x, x, doc_ids) for doc_ids in batches]
            grads = [torch.autograd.grad(o.loss, gpt.embed.weight)[0] for o in out] if device == "cuda" else []
            return [o.loss for o in out] + [gpt(x, doc_ids_BL=doc_ids).logits for doc_ids in batches] + grads

    monkeypatch.setattr(model_file, "document_mask", lambda doc_ids, fused: make(doc_ids, False))
    expected = run()
    monkeypatch.setattr(model_file, "document_mask", lambda doc_ids, fused: make(doc_ids, True))
    monkeypatch.setattr(model_file, "fused_attention", lambda: model_file.flex_attention)
    if device == "cuda":
        monkeypatch.undo()
    found = run()
    gpt.train()
    for block in gpt.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
    run()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = run()
    for ours in (found, compiled):
        for a, b in zip(ours, expected, strict=True):
            check(a, b, 1e-5 if device == "cpu" else 3e-3)
    assert abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize("kind", [dict(), dict(dense=True), dict(n_shared_experts=1)])
def test_a_float32_model_under_autocast(kind, device):
    """Attention and dense layers are in bfloat16 there, the residual stream is in float32."""
    model = make(impl="reference", **kind).to(device).train()
    x, y = tokens().to(device), tokens(seed=2).to(device)
    expected = model(x, y).loss
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model(x, y).loss
    torch.autograd.backward(loss)
    assert 0 < abs(loss - expected) < 0.02
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
