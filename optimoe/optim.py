"""Learning-rate schedules, AdamW, and Muon, which takes the matrices inside blocks and leaves the rest to AdamW.

Muon (kellerjordan.github.io/posts/muon) replaces the gradient's momentum M = U S V^T by about U V^T. Scaled by 0.2
sqrt(longer side) (arXiv 2502.16982) its step is as long as AdamW's: one learning rate and one decay serve both.
Matrices stacked in a parameter (experts; gate and up; query, key and value) are made orthogonal one by one.

A CUDA graph can capture a step: it does not wait for the device, and only the first one allocates. Learning rates may
be 0-d tensors. Shapes: N matrices in a batch, each (A, B).
"""

import math

import torch
from torch.optim.adamw import adamw as adamw_fused

from moe_kernels import adamw_step, norm
from moe_kernels.muon import COEFFICIENTS, ROUNDS, fits, muon_update


def lr_at(step, cfg):
    """Learning rate of step 0 .. steps-1: linear warm-up to lr, then decay to min_lr_frac * lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    wsd = cfg.schedule == "wsd"
    decay_start = max(cfg.warmup_steps, (1 - cfg.decay_frac) * cfg.steps if wsd else 0)
    progress = max(0.0, (step - decay_start) / max(1, cfg.steps - decay_start))
    share = 1 - progress if wsd else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.min_lr_frac + (1 - cfg.min_lr_frac) * share)


def clip_factor(grad_norm, limit):
    """The factor that brings gradients of this norm to at most `limit`; None if limit is 0."""
    return (limit / (grad_norm + 1e-6)).clamp(max=1.0) if limit else None


def total_norm(tensors):
    """Norm of all of them together, in float32."""
    large, lists = [], {}
    for tensor in tensors:
        (large if norm.fits(tensor) else lists.setdefault(tensor.dtype, [])).append(tensor)
    norms = [each for same in lists.values() for each in torch._foreach_norm(same, 2, dtype=torch.float32)]
    return torch.stack(norms + ([norm.square_of(large).sqrt()] if large else [])).norm()


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with its fused kernel for small tensors; large and bfloat16 ones go to `adamw_step`.

    copies: {float32 parameter: its bfloat16 copy in the model}, which holds the gradient and gets the new weight too.
    seed: of stochastic rounding. `found_inf` (float scalar tensor; 1: skip the step) and `scale` (a factor of the
    gradients) are set before a step, or None."""

    LARGE = 2**20  # values from which a float32 tensor is worth a launch of its own
    found_inf = scale = None

    def __init__(self, groups, lr, betas, eps, copies=None, seed=0):
        super().__init__(groups, lr, betas, eps, fused=True, capturable=isinstance(lr, torch.Tensor))
        self.copies = copies or {}
        params = (p for group in self.param_groups for p in group["params"])
        # With one seed, equal positions of two tensors would be rounded alike.
        self.seeds = {p: (seed * 1_000_003 + i) % 2**31 for i, p in enumerate(params)}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            small, large = [], []
            for p in group["params"]:
                grad = self.copies.get(p, p).grad
                if grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                tensors = p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"]
                if p in self.copies or p.dtype == torch.bfloat16 or p.is_cuda and p.numel() >= self.LARGE:
                    large.append((*tensors, self.copies.get(p), self.seeds[p]))
                else:
                    small.append(tensors)
            if small:
                self._step_small(group, *zip(*small, strict=True))
            if large:
                self._step_large(group, large)

    def _step_small(self, group, weights, grads, means, variances, steps):
        if self.scale is not None:
            torch._foreach_mul_(grads, self.scale)
        settings = {name: group[name] for name in ("capturable", "lr", "weight_decay", "eps", "amsgrad", "maximize")}
        settings |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "found_inf": self.found_inf}
        adamw_fused(weights, grads, means, variances, [], steps, fused=True, **settings)

    def _step_large(self, group, large):
        steps = [step for *_, step, _, _ in large]
        skip = torch.zeros((), device=steps[0].device) if self.found_inf is None else self.found_inf
        scale = torch.ones_like(skip) if self.scale is None else self.scale
        torch._foreach_add_(steps, [1 - skip] * len(steps))  # a list: the host would wait to read a single tensor
        settings = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
        for *tensors, copy, seed in large:
            adamw_step(*tensors, *settings, scale, skip, copy, seed)


def orthogonalize(m_NAB):
    """(N, A, B) with singular values near 1; a zero matrix stays zero. bfloat16 on CUDA, else float32."""
    a, b, c = COEFFICIENTS
    x = m_NAB / m_NAB.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the square products are then those of the shorter side
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Each group has parameters of one shape, (R, B) or (E, R, B), and `rows`: how many of the R rows each of the
    matrices stacked in them has."""

    found_inf = scale = None

    def __init__(self, groups, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and on_chip(params[0], group["rows"]):
                self._step_on_chip(params, group)
                continue
            # A stack of experts is a batch already.
            for batch in [params] if params and params[0].ndim == 2 else [[p] for p in params]:
                self._step_batch(batch, group)

    def _tensors(self, params):
        return params, [self.state[p]["momentum"] for p in params], [p.grad for p in params]

    def _step_on_chip(self, params, group):
        rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=params[0].device)
        settings = group["rows"], rate, group["momentum"], group["weight_decay"]
        muon_update(*self._tensors(params), *settings, self.scale, self.found_inf, params[0].ndim == 3)

    def _step_batch(self, batch, group):
        rate, mu = group["lr"], group["momentum"]
        weights, momenta, grads = self._tensors(batch)
        if self.scale is not None:
            torch._foreach_mul_(grads, self.scale)
        if self.found_inf is not None:
            rate = rate * (1 - self.found_inf)
            grads = [torch.where(self.found_inf > 0, m, g) for m, g in zip(momenta, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - mu)
        ahead = torch._foreach_lerp(grads, momenta, mu)  # Nesterov
        experts = batch[0].ndim == 3
        ahead_NAB = ahead[0] if experts else torch.stack(ahead)
        parts = [orthogonalize(m) * (0.2 * math.sqrt(max(m.shape[-2:]))) for m in ahead_NAB.split(group["rows"], -2)]
        update_NAB = torch.cat(parts, -2)
        if experts:
            # An expert without tokens only decays: orthogonalized, its fading momentum would be a full step.
            update_NAB = update_NAB * (grads[0].abs().amax((-2, -1), keepdim=True) > 0)
        updates = update_NAB.view(len(batch), *ahead[0].shape)
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        for weight, update in zip(weights, updates, strict=True):
            weight.sub_(update * rate)


def on_chip(p, rows):
    """Whether `muon_update` can step this parameter: small float32 matrices on CUDA."""
    return p.is_cuda and p.dtype == torch.float32 and fits(p.shape, rows)


class Together:
    """Optimisers that act as one; its state_dict is the list of theirs."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @property
    def copies(self):
        return {p: copy for part in self.parts for p, copy in getattr(part, "copies", {}).items()}

    def set_lr(self, lr):
        for group in self.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def step(self, skip=None, scale=None):
        """skip, scale: `found_inf` and `scale` of AdamW; gradients may be scaled in place."""
        for part in self.parts:
            part.found_inf, part.scale = skip, scale
            part.step()

    def grad_norm(self):
        copies, params = self.copies, [p for group in self.param_groups for p in group["params"]]
        grads = (copies.get(p, p).grad for p in params)
        return total_norm([grad for grad in grads if grad is not None])

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()
        for copy in self.copies.values():
            copy.grad = None

    def weights(self, model):
        """model.state_dict() with float32 weights in place of their bfloat16 copies."""
        copies = {copy: p.detach() for p, copy in self.copies.items()}
        state = model.state_dict()
        state.update({name: copies[p] for name, p in model.named_parameters() if p in copies})
        return state

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        """Load the states; rates, decay and betas stay this run's."""
        for part, state in zip(self.parts, states, strict=True):
            here = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
            part.load_state_dict(state)
            for group, settings in zip(part.param_groups, here, strict=True):
                group |= settings


def stacked_rows(name, shape, cfg):
    """How many rows each of the matrices has that are stacked in a weight of model.GPT, in order."""
    if name.endswith("attn.qkv.weight"):
        return [n * cfg.head_dim for n in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)]
    return [shape[-2] // 2] * 2 if name.endswith(("w_in", "gate_up.weight")) else [shape[-2]]


def is_hidden(name, p):
    """Whether a parameter of model.GPT is a matrix inside a block other than the router."""
    return name.startswith("blocks.") and p.ndim > 1 and "router" not in name


def make_optimizer(model, cfg, piece=None):
    """AdamW for all, or Muon for the matrices inside blocks other than the router, as cfg.optimizer says. Norms do not
    decay.

    With AdamW those matrices become bfloat16 in the model, in place (docs/optimizer.md). With cfg.weights == "bfloat16"
    they are the weights. Else they are copies of float32 weights, but only where that changes no value.
    piece(p): the part of dimension 0 of a parameter that this rank updates (Muon's 2-D matrices are always whole)."""
    copied = cfg.weights == "float32" and model.dtype == torch.bfloat16 and cfg.grad_accum == 1
    hidden, experts, matrices, norms, copies = {}, [], [], [], {}
    piece = piece or (lambda p: p)
    for name, p in model.named_parameters():
        if cfg.optimizer == "muon" and is_hidden(name, p):
            group = {"params": [], "rows": stacked_rows(name, p.shape, cfg)}
            hidden.setdefault((p.shape, *group["rows"]), group)["params"].append(piece(p) if p.ndim == 3 else p)
            continue
        own = piece(p)
        if is_hidden(name, p) and (copied or cfg.weights == "bfloat16"):
            exact = own.detach().clone()
            p.data = p.detach().bfloat16()
            own = piece(p)
            if copied:
                exact = torch.nn.Parameter(exact)
                copies[exact], own = own, exact
        (experts if p.ndim == 3 else matrices if p.ndim == 2 else norms).append(own)
    device = model.embed.weight.device
    lr = torch.tensor(cfg.lr, device=device) if device.type == "cuda" else cfg.lr  # a CUDA graph sees it change
    # Experts have a group of their own because they have one in checkpoints.
    decays = (matrices, cfg.weight_decay), (norms, 0.0), (experts, cfg.weight_decay)
    groups = [{"params": ps, "weight_decay": decay} for ps, decay in decays if ps]
    parts = [AdamW(groups, lr, (cfg.beta1, cfg.beta2), cfg.eps, copies, cfg.seed)]
    if hidden:
        parts.append(Muon(list(hidden.values()), lr, cfg.muon_momentum, cfg.weight_decay))
    return Together(*parts)
