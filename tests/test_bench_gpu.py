"""bench: what only a GPU runs, played on a CPU. Run: python -m pytest tests/test_bench_gpu.py"""

import gc
import json
import weakref
from types import SimpleNamespace

import torch
from triton.runtime.jit import JITFunction

from bench import kernels, node
from bench.problem import TINY
from bench.timing import Times
from moe_kernels import language
from optimoe import parallel


def test_ncu_learns_the_name_of_every_launch(monkeypatch, capsys):
    """Also of kernels that have run before, which language.launch starts without Triton."""
    kernel = object.__new__(JITFunction)
    kernel.fn = type("Function", (), {"__name__": "up_kernel"})()
    starts = SimpleNamespace(run=lambda *args: None, function=None, packed_metadata=None)
    monkeypatch.setattr(language.driver, "_active", SimpleNamespace(get_current_stream=lambda device: None))
    call = lambda: language.launch(kernel, (2,), (torch.zeros(3),))
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: starts)
    monkeypatch.setattr(kernels.problem, "make_inputs", lambda *args: None)
    monkeypatch.setattr(kernels, "layer_calls", lambda inputs: ({"up": call}, 0.0))
    monkeypatch.setattr(kernels, "routing_calls", lambda *args: {})
    for place, name in ((torch.cuda, "synchronize"), (torch.cuda.profiler, "start"), (torch.cuda.profiler, "stop")):
        monkeypatch.setattr(place, name, lambda: None)
    kernels.run_once(TINY[0], ["up", "up"])
    assert json.loads(capsys.readouterr().out) == 2 * [["up", "up_kernel"]]


def test_the_model_of_one_gpu_is_gone_before_that_of_all(monkeypatch):
    """Else the second one would have to fit beside it."""
    seen = []

    def measure(cfg, rank, size, device):
        assert not seen or seen[0]() is None
        model = torch.nn.Module()
        model.cycle = model.__call__
        seen.append(weakref.ref(model))
        return Times(1.0, 1.0, 1.0), 0, {}

    monkeypatch.setattr(node, "measure", measure)
    for place, name in ((node.dist, "barrier"), (node.dist, "all_reduce"), (parallel, "connect")):
        monkeypatch.setattr(place, name, lambda *args, **kwargs: None)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    gc.disable()
    try:
        node.main([])
    finally:
        gc.enable()
    assert len(seen) == 2
