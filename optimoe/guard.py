"""Steps that must not be taken: a loss or a gradient that is not finite, or a loss that has exploded.

`judge` decides on the device, inside the step and its CUDA graph. The host looks only at log lines and before
checkpoints. bad_steps=skip goes on with the next batch, unless PATIENCE steps in a row were bad. bad_steps=stop leaves
the weights as they are from the bad step until the host looks. Either way they are still those before the first bad
step, so `Watch` can repeat it exactly and write down what happens in which layer.
"""

import json
import math

import torch

from data import files
from optimoe import checkpoint

STEPS, BAD = range(2)  # of window["steps"]: steps since the last log line, skipped ones among them
PATIENCE = 10  # skipped steps in a row after which a run does not go on


def loss_limit(cfg):
    """Cross-entropy above which a step counts as exploded: half as much again as guessing evenly costs."""
    return cfg.max_loss or 1.5 * math.log(cfg.vocab_size) + 1


@torch.no_grad()
def judge(window, loss, grad_norm, cfg, discard=None):
    """float32 scalar, 1 where this step must be skipped. Counts it in "steps" and "skipped_in_a_row" of the window.

    discard: None, or a bool scalar: the step will be repeated, and is skipped without being counted."""
    steps, row = window["steps"], window["skipped_in_a_row"]
    bad = ~(grad_norm.isfinite() & (loss <= loss_limit(cfg)))  # so written, a NaN is bad
    if cfg.bad_steps == "stop":
        bad = bad | (row > 0)
    added, in_a_row = torch.stack([torch.ones_like(bad), bad]), (row + 1) * bad
    if discard is not None:
        added, in_a_row, bad = added & ~discard, torch.where(discard, row, in_a_row), bad | discard
    steps.add_(added)
    row.copy_(in_a_row)
    return bad.float()


def remedy(run_dir, lr):
    """What to do about such an end. Every checkpoint is from before it: weights that are not finite are never saved."""
    found = checkpoint.find(run_dir)
    goes_on = f"goes on from {found[-1][1].name}" if found else "starts again, as there is no checkpoint yet"
    return f"use a lower lr: --resume={run_dir} --lr={lr / 2:.2g} {goes_on}"


def check_finite(name, value, step, run_dir, lr):
    if not math.isfinite(value):
        raise ValueError(f"training diverged: the {name} is {value} at step {step}: {remedy(run_dir, lr)}")


class Watch:
    """Remembers where the loader was before the latest steps, and finds those among them that must not be taken."""

    def __init__(self, cfg, run, model, loader, window):
        self.cfg, self.run, self.model, self.loader, self.window = cfg, run, model, loader, window
        self.cursors = []

    def remember(self):
        """Before each step."""
        self.cursors.append(self.loader.state_dict())

    def forget(self):
        """After each log line: the sums of the window start again."""
        del self.cursors[:-PATIENCE]
        for name, sums in self.window.items():
            if name != "skipped_in_a_row":
                sums.zero_()

    def must_stop(self):
        """Whether the run must not go on; waits for the device."""
        return int(self.window["skipped_in_a_row"]) >= (1 if self.cfg.bad_steps == "stop" else PATIENCE)

    def explain(self, step):
        """Dump the first bad step that is remembered and raise ValueError. Leaves the model unfit for training."""
        back = min(int(self.window["skipped_in_a_row"]), len(self.cursors))  # the run may have been resumed among them
        step += 1 - back
        path = self.run.dir / f"bad-step-{step:08d}-rank{self.run.rank}.json"
        loss, what = dump(path, self.model, self.loader, self.cursors[-back], self.cfg, step)
        raise ValueError(
            f"training diverged at step {step}: the loss is {loss:.4g}, {what} (layers and batch: {path}). "
            f"No weight has changed since: {remedy(self.run.dir, self.cfg.lr)}"
        )


def dump(path, model, loader, cursor, cfg, step):
    """Repeat the bad step with the weights as they are (this rank's share, no update) and write a JSON file about it.

    cursor: loader.state_dict() before the step. Returns (mean loss, what broke first), both for people."""
    weights = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    outputs = [[] for _ in model.blocks]
    for block, seen in zip(model.blocks, outputs, strict=True):
        block._compiled_call_impl = None  # hooks on compiled blocks would be compiled with them, again
        block.register_forward_hook(lambda block, inputs, output, seen=seen: seen.append(summary(output[0])))
    loader.load_state_dict(cursor)
    model.zero_grad(set_to_none=True)
    losses, batches = [], []
    for _ in range(cfg.grad_accum):
        tokens_BL, targets_BL = loader.next()
        out = model(tokens_BL, targets_BL)
        ((out.loss + cfg.balance_coef * out.balance + cfg.z_coef * out.z) / cfg.grad_accum).backward()
        losses.append(float(out.loss.detach()))
        batches.append(tokens_BL.tolist())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: summary(grad) for name, grad in grads.items() if grad.numel()}
    causes = [f"{name} was not finite before" for name in weights]
    layers = [layer for layer, seen in enumerate(outputs) if not all(values["finite"] for values in seen)]
    causes += [f"the output of layer {layer} is the first that is not finite" for layer in layers]
    broken = [name for name, values in reversed(gradients.items()) if not values["finite"]]  # as the backward pass runs
    causes += [f"the gradient of {name} is the first that is not finite" for name in broken]
    what = [*causes, f"above the limit max_loss={loss_limit(cfg):.3g}"][0]
    found = {
        "step": step,
        "loss": [as_json(loss) for loss in losses],
        "first": what,
        "weights_not_finite": weights,
        "output_of_layer": dict(enumerate(outputs)),
        "gradient": gradients,
        "cursor": cursor,
        "tokens": batches,
    }
    files.replace(path, json.dumps(found))
    return sum(losses) / len(losses), what


def summary(values):
    """Root mean square and largest magnitude of a tensor, as JSON takes them."""
    values = values.detach().float()
    rms, largest = float(values.square().mean().sqrt()), float(values.abs().max())
    return {"rms": as_json(rms), "max": as_json(largest), "finite": bool(values.isfinite().all())}


def as_json(number):
    return number if math.isfinite(number) else str(number)
