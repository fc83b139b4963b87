"""Tokens per second of generation with the KV cache (eval/generate.py).

    python -m bench.generation --csv=generate.csv   batches of 1, 16, 256; prompts of 128 tokens, 128 new
    python -m bench.generation --preset=paper-d1024-e16-k2 --batches=1,64 --prompt=1024 --new=256

Without a GPU the defaults are a tiny model, batches of 1 and 4, and 16 tokens. In the rows, kernel is "generate" and T
the batch. Times are of a step, which makes one token of every text: the time of the call, prompts included, divided by
--new. gb_s counts the weights and the cache that a step must read; ceiling is the fraction of the speed of a copy that
this reading reaches. No token ends a text, so every text has the full length.
"""

from dataclasses import dataclass

import torch

from bench.problem import Cost, Shape
from bench.rows import BenchConfig, Results
from bench.timing import quantiles, skipping, wall_ms
from eval.generate import generate
from model import GPT
from optimoe import config
from optimoe.load import cast_once
from optimoe.sizes import count_params, preset, preset_fields


@dataclass(frozen=True)
class Config(BenchConfig):
    # Generation
    preset: str = "paper-d512-e64-k4"  # a name of optimoe.sizes.PRESETS
    batches: tuple[int, ...] = (1, 16, 256)  # prompts answered together
    prompt: int = 128  # tokens of each prompt
    new: int = 128  # tokens generated for each prompt
    repeats: int = 3  # timed calls

    @staticmethod
    def start_fields(flags):
        return {} if torch.cuda.is_available() else dict(preset="tiny", batches=(1, 4), prompt=16, new=16)

    def __post_init__(self):
        preset_fields(self.preset)
        config.check_range(self, "prompt new", 1, 2**21)  # half of the longest seq_len each
        config.check_range(self, "repeats", 1)
        config.require(min(self.batches) >= 1, "batches", self.batches, "use 1 or more")


def step_cost(cfg, batch, length, itemsize):
    """Cost of one token for each of `batch` rows of `length` tokens: 2 FLOPs per active weight and 4 H d per cached
    token and layer; bytes of the weights of all but experts, of as many experts as batch * K can reach, and of the
    cache."""
    params, expert = count_params(cfg), 3 * cfg.d_model * cfg.d_expert * cfg.n_layers
    # The head is read whole, the table of embeddings is not.
    always = params.active - params.embedding - cfg.top_k * expert + cfg.vocab_size * cfg.d_model
    cached = batch * length * cfg.n_layers * cfg.head_dim
    flops = 2 * batch * (always + cfg.top_k * expert) + 4 * cached * cfg.n_heads
    read = always + min(cfg.n_experts, batch * cfg.top_k) * expert + 2 * cached * cfg.n_kv_heads
    return Cost(flops, itemsize * read)


def main(argv=None):
    cfg, failures = config.parse(Config, argv, __doc__), []
    results, device = Results(cfg), "cuda" if torch.cuda.is_available() else "cpu"
    fields = {"vocab_size": 320} | preset_fields(cfg.preset)
    model_cfg = preset(cfg.preset, **fields | dict(seq_len=cfg.prompt + cfg.new, dtype=str(results.dtype)[6:]))
    torch.manual_seed(0)
    with torch.device(device):
        model = cast_once(GPT(model_cfg).eval())
    costs = {n: step_cost(model_cfg, n, cfg.prompt + cfg.new // 2, results.dtype.itemsize) for n in cfg.batches}

    machine = results.add_ceilings()
    for batch, cost in costs.items():
        shape = Shape(batch, model_cfg.d_model, model_cfg.d_expert, model_cfg.n_experts, model_cfg.top_k)
        prompts = torch.randint(model_cfg.vocab_size, (batch, cfg.prompt)).tolist()
        run = lambda: generate(model, prompts, cfg.new, batch_size=batch)  # noqa: B023  used at once
        with skipping(f"batch {batch}", failures):
            run()  # compiles
            times = quantiles([wall_ms(run) / cfg.new for _ in range(cfg.repeats)])
            share = cost.bytes / machine.tb_s * 1e-9 / times.p50
            note = f"{batch / times.p50 * 1e3:,.0f} tokens/s"
            results.add("generate", "cache", "step", shape, times, cost, note, ceiling=share)
    return results.finish(failures)


if __name__ == "__main__":
    raise SystemExit(config.command_line(main))
