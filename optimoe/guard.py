"""Steps that must not be taken: a loss or a gradient that is not finite, or a loss that has exploded.

`judge` runs on the device inside the step (also inside its CUDA graph) and only says whether to take it, so nothing waits. With bad_steps=skip the
run goes on with the next batch, unless all steps between two log lines were bad. With bad_steps=stop the weights also stand still from the bad
step on, until the next log line, where the host looks: they and the remembered cursor of the loader then repeat the bad step exactly, and `dump`
writes down what it finds in which layer.
"""

import json
import math

import torch

from optimoe import checkpoint
from optimoe.optim import local

STEPS, BAD, FIRST = range(
    3
)  # of window["steps"]: steps since the last log line, bad ones among them, number of the first bad one (from 1)


def loss_limit(cfg):
    """Cross-entropy above which a step counts as exploded: half as much again as guessing evenly costs."""
    return cfg.max_loss or 1.5 * math.log(cfg.vocab_size) + 1


@torch.no_grad()
def judge(window, loss, grad_norm, cfg):
    """float32 scalar, 1 where this step must be skipped. Counts it in window["steps"]."""
    steps = window["steps"]
    bad = ~(grad_norm.isfinite() & (loss <= loss_limit(cfg)))  # so written, a NaN is bad
    first = torch.where(bad & (steps[BAD] == 0), steps[STEPS] + 1, steps[FIRST])
    steps.copy_(torch.stack([steps[STEPS] + 1, steps[BAD] + bad, first]))
    return (bad if cfg.bad_steps == "skip" else steps[BAD] > 0).float()


def remedy(run_dir):
    """What to do about such an end. Every checkpoint is from before it: weights that are not finite are never saved."""
    files = checkpoint.find(run_dir)
    goes_on = f"goes on from {files[-1][1].name}" if files else "starts again, for there is no checkpoint yet"
    return f"use a lower lr; --resume={run_dir} --lr=... {goes_on}"


def check_finite(name, value, step, run_dir):
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} at step {step}: {remedy(run_dir)}")


def summary(values):
    """Root mean square and largest magnitude of a tensor, as JSON takes them."""
    values = values.detach().float()
    return {
        "rms": as_json(float(values.square().mean().sqrt())),
        "max": as_json(float(values.abs().max())),
        "finite": bool(values.isfinite().all()),
    }


def as_json(number):
    return number if math.isfinite(number) else str(number)


def dump(path, model, loader, cursor, cfg, step):
    """Repeat the bad step with the weights as they are (this rank's share, without an update) and write what happens to a JSON file.

    cursor: loader.state_dict() before the step. Returns (mean loss, where it broke first), both for people. Leaves the model unfit for training."""
    weights = [name for name, p in model.named_parameters() if not local(p).isfinite().all()]
    outputs = {}
    for index, block in enumerate(model.blocks):
        block._compiled_call_impl = None  # hooks on compiled blocks would be compiled with them, again
        block.register_forward_hook(
            lambda block, inputs, output, index=index: outputs.setdefault(index, []).append(summary(output[0]))
        )
    loader.load_state_dict(cursor)
    model.zero_grad(set_to_none=True)
    losses, batches = [], []
    for _ in range(cfg.grad_accum):
        tokens_BL, targets_BL = loader.next()
        out = model(tokens_BL, targets_BL)
        ((out.loss + cfg.balance_coef * out.balance + cfg.z_coef * out.z) / cfg.grad_accum).backward()
        losses.append(float(out.loss.detach()))
        batches.append(tokens_BL.tolist())
    gradients = {
        name: summary(local(p.grad))
        for name, p in model.named_parameters()
        if p.grad is not None and local(p.grad).numel()
    }
    layers = [index for index, seen in outputs.items() if not all(s["finite"] for s in seen)]
    broken = [
        name for name, s in reversed(gradients.items()) if not s["finite"]
    ]  # the backward pass meets the last layers first
    where = (
        f"the weights already: {weights[0]}"
        if weights
        else f"the output of layer {layers[0]}"
        if layers
        else f"the gradient of {broken[0]}"
        if broken
        else f"finite when repeated: above max_loss={loss_limit(cfg):.3g}"
    )
    with open(path, "w") as file:
        json.dump(
            {
                "step": step,
                "loss": [as_json(loss) for loss in losses],
                "first": where,
                "weights_not_finite": weights,
                "output_of_layer": outputs,
                "gradient": gradients,
                "cursor": cursor,
                "tokens": batches,
            },
            file,
        )
    return sum(losses) / len(losses), where
