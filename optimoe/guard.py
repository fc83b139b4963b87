"""Steps that must not be taken: a loss or a gradient that is not finite, or a loss that has exploded.

`judge` decides on the device, inside the step and its CUDA graph; the host looks at log lines and before checkpoints.
bad_steps=skip goes on until PATIENCE steps in a row were bad. After a bad step, bad_steps=stop changes no weight until
the host looks, so that `Watch` can repeat that step and write down what happens in which layer.
"""

import json
import math
import shlex

import torch

from data import files
from optimoe import checkpoint

BAD = 1  # index into window["steps"]: steps skipped since the last log line
PATIENCE = 10  # skipped steps in a row that end a run


def new_window(cfg, device):
    """Sums since the last log line, on the device; part of a checkpoint."""
    shape = (0 if cfg.dense else cfg.n_layers, cfg.n_experts)
    return {
        "sums": torch.zeros(4, device=device),  # cross-entropy, balance, z, batches
        "steps": torch.zeros(2, device=device, dtype=torch.int64),  # all steps, skipped steps
        "skipped_in_a_row": torch.zeros((), device=device, dtype=torch.int64),  # up to now; log lines do not reset it
        "counts_NE": torch.zeros(shape, device=device, dtype=torch.int64),
        "probs_NE": torch.zeros(shape, device=device),
    }


def loss_limit(cfg):
    """Cross-entropy above which a step has exploded: by default 1.5 times what guessing evenly costs, plus 1."""
    return cfg.max_loss or 1.5 * math.log(cfg.vocab_size) + 1


@torch.no_grad()
def judge(window, loss, grad_norm, cfg, discard=None):
    """float32 scalar, 1 if this step must be skipped. Updates "steps" and "skipped_in_a_row" of the window.

    discard: None, or a bool scalar: the step will be repeated, and is skipped without being counted."""
    steps, in_a_row = window["steps"], window["skipped_in_a_row"]
    bad = ~(grad_norm.isfinite() & (loss <= loss_limit(cfg)))  # so written, a NaN is bad
    if cfg.bad_steps == "stop":
        bad = bad | (in_a_row > 0)
    added, new_in_a_row = torch.stack([torch.ones_like(bad), bad]), (in_a_row + 1) * bad
    if discard is not None:
        added, new_in_a_row = added & ~discard, torch.where(discard, in_a_row, new_in_a_row)
        bad = bad | discard
    steps.add_(added)
    in_a_row.copy_(new_in_a_row)
    return bad.float()


def remedy(run_dir, lr, loss=None):
    """What the user can do. Every checkpoint is sound: weights that are not finite are never saved.

    loss: the finite one above the user's max_loss, if that is what was found."""
    found, again = checkpoint.find(run_dir), f"--resume={shlex.quote(str(run_dir))}"
    lower = f"{min(lr / 2, 1e-2):.2g}"
    goes_on = f"goes on from {found[-1][1].name}" if found else "starts again, as there is no checkpoint yet"
    ways = {"a higher max_loss": f"--max_loss={1.5 * loss:.2g}"} if loss is not None else {}
    ways |= {"a lower lr": f"--lr={lower}"} if 0 < float(lower) < lr else {}
    if not ways:
        return f"no lr is lower than {lr:g}; look for the cause in the data and in the weights at the start"
    return f"use {' or '.join(ways)}: {again} {' or '.join(ways.values())} {goes_on}"


def check_finite(name, value, step, run_dir, lr):
    if not math.isfinite(value):
        raise ValueError(f"training diverged: the {name} is {value} at step {step}: {remedy(run_dir, lr)}")


class Watch:
    """Remembers where the loader was before the latest steps, to repeat a bad one."""

    def __init__(self, cfg, run, model, loader, window):
        self.cfg, self.run, self.model, self.loader, self.window = cfg, run, model, loader, window
        self.cursors = []

    def remember(self):
        """To be called before each step."""
        self.cursors.append(self.loader.state_dict())

    def forget(self):
        """To be called after each log line."""
        del self.cursors[:-PATIENCE]
        for name, sums in self.window.items():
            if name != "skipped_in_a_row":
                sums.zero_()

    def must_stop(self):
        """Whether the run must end; waits for the device."""
        return int(self.window["skipped_in_a_row"]) >= (1 if self.cfg.bad_steps == "stop" else PATIENCE)

    def explain(self, step):
        """Dump the first bad step that is remembered, and raise ValueError."""
        back = min(int(self.window["skipped_in_a_row"]), len(self.cursors))  # a resumed run has fewer cursors
        step += 1 - back
        path = self.run.dir / f"bad-step-{step:08d}-rank{self.run.rank}.json"
        loss, what = dump(path, self.model, self.loader, self.cursors[-back], self.cfg, step)
        found = f"the loss is {loss:.4g}, {what} (layers and batch: {path}). No weight has changed since"
        too_high = loss if 0 < self.cfg.max_loss < loss < math.inf else None
        raise ValueError(f"training diverged at step {step}: {found}: {remedy(self.run.dir, self.cfg.lr, too_high)}")


def dump(path, model, loader, cursor, cfg, step):
    """Repeat this rank's share of a bad step from the loader's `cursor` and write a JSON file about it. Returns (mean
    loss, what broke first). Leaves the model unfit for training."""
    rows, losses, batches = [], [], []

    def look(name, t, what):
        t = t.detach().float()
        if t.numel():
            row = {"rms": t.square().mean().sqrt(), "max": t.abs().max(), "finite": t.isfinite().all()}
            rows.append({"name": name, "what": what} | {key: as_json(value.item()) for key, value in row.items()})

    for name, p in model.named_parameters():
        look(name, p, "{} was not finite before")
    what = "the output of {} is the first that is not finite"
    for i, block in enumerate(model.blocks):
        block._compiled_call_impl = None  # it would be compiled again with the hook
        block.mlp.eval()  # with ep: by the exact exchange, as a step with too many tokens on a rank was judged
        block.register_forward_hook(lambda block, _, output, i=i: look(f"layer {i}", output[0], what))
    loader.load_state_dict(cursor)
    model.zero_grad()
    for _ in range(cfg.grad_accum):
        batch = loader.next()
        out = model(*batch)
        ((out.loss + cfg.balance_coef * out.balance + cfg.z_coef * out.z) / cfg.grad_accum).backward()
        losses.append(out.loss.item())
        batches.append(batch[0].tolist())
    for name, p in reversed(list(model.named_parameters())):  # as the backward pass runs
        if p.grad is not None:
            look(name, p.grad, "the gradient of {} is the first that is not finite")
    broken = [row["what"].format(row["name"]) for row in rows if not row["finite"]]
    first = broken[0] if broken else f"above the limit max_loss={loss_limit(cfg):.3g}"
    found = {"step": step, "loss": list(map(as_json, losses)), "first": first, "seen": rows}
    files.replace(path, json.dumps(found | {"cursor": cursor, "tokens": batches}))
    return sum(losses) / len(losses), first


def as_json(number):
    return number if math.isfinite(number) else str(number)
