"""How a training step runs fast on a GPU: compiled blocks, and all of it as one CUDA graph."""

import torch

from optimoe import exchange
from optimoe.sizes import flops_per_token


def compile_blocks(model, cfg):
    """torch.compile of each block, half a minute. "auto": if training takes a minute at 20 % of an H100."""
    flops = cfg.steps * cfg.batch_size * cfg.seq_len * flops_per_token(cfg)
    if cfg.compile == "true" or cfg.compile == "auto" and flops > 1e16:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)


class GraphedStep:
    """step(batches) as one CUDA graph launch instead of a thousand kernel launches; batches must keep their shapes.

    The first WARM_UP calls run `step` itself, on the stream of the capture; the next one records the graph."""

    WARM_UP = 3

    def __init__(self, step):
        self.step, self.calls, self.graph, self.stream = step, 0, torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, batches):
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step(batches)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == self.WARM_UP + 1:
            self.inputs = [tuple(t.clone() for t in batch) for batch in batches]
            # thread_local: meanwhile the loader's thread may pin memory for its next batches.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.step(self.inputs)
        for inputs, batch in zip(self.inputs, batches, strict=True):
            for buffer, t in zip(inputs, batch, strict=True):
                buffer.copy_(t)
        self.graph.replay()
        return self.result


def fast_step(step, model, cfg, device, world):
    """The step as it runs fastest here: compiled blocks, one CUDA graph."""
    fast = device.type == "cuda" and (world == 1 or cfg.parallel == "ddp" or model.limit is not None)
    if fast:
        compile_blocks(model, cfg)
    graphed = fast and cfg.cuda_graph and cfg.impl in ("auto", "triton")  # the others count rows on the host
    run = GraphedStep(step) if graphed else step
    return run if model.limit is None else exchange.repeating(run, step, model)
