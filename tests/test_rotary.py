"""Rotation (and norms) of queries and keys against the float64 reference: python -m pytest tests/test_rotary.py."""

import pytest
import torch

from model import ModelConfig, rope_tables
from moe_kernels import reference, rope
from tests.checks import BOUNDS, DTYPES, check, rms_ratio

NAMES = ("q", "k", "v", "dqkv", "dq_weight", "dk_weight")


def problem(B, L, H, Hkv, d, dtype, device, norm=False, positions=False):
    """Arguments of `rope` and the gradients of its three outputs, laid out as attention gives them."""
    g = torch.Generator().manual_seed(B + L + H + d)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    cos, sin = rope_tables(ModelConfig(seq_len=L + 7, head_dim=d))
    pos = torch.randint(L + 7, (B, L), generator=g) if positions else slice(L)
    qkv, weights = randn(B, L, H + 2 * Hkv, d), [1 + 0.3 * randn(d), 1 + 0.3 * randn(d)] if norm else []
    dy = [randn(B, n, L, d).to(device, dtype).transpose(1, 2) for n in (H, Hkv, Hkv)]
    qkv, *weights = (t.to(device, dtype).requires_grad_() for t in (qkv, *weights))
    return [qkv, cos[pos].to(device), sin[pos].to(device), H, *(weights or (None, None)), 1e-5], dy


def results(args, dy, impl="triton"):
    out = rope(*args, impl=impl)
    return *out, *torch.autograd.grad(out, [args[0], *(w for w in args[4:6] if w is not None)], dy)


def truth(args, dy):
    wide = [t.detach().double().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t for t in args]
    return results(wide, [t.double() for t in dy], "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "B,L,H,Hkv,d,positions",
    [
        (2, 9, 4, 2, 8, False),
        (1, 21, 3, 3, 64, False),
        (3, 5, 2, 1, 12, True),
        (2, 1, 2, 2, 2, True),
        (0, 3, 2, 2, 8, False),
    ],
)
def test_matches_reference(B, L, H, Hkv, d, positions, norm, dtype, device, poison):
    args, dy = problem(B, L, H, Hkv, d, dtype, device, norm, positions)
    for name, a, b in zip(NAMES, results(args, dy), truth(args, dy), strict=False):
        check(a, b, BOUNDS[dtype], name)
        assert a.dtype == dtype and (name == "v" or a.is_contiguous())


def test_the_check_can_fail(device):
    args, dy = problem(2, 9, 4, 2, 8, torch.float32, device, norm=True)
    wrong = results([args[0], args[1], -args[2], *args[3:]], dy)  # turned the other way
    ratios = [rms_ratio(a, b) for a, b in zip(wrong, truth(args, dy), strict=True)]
    assert all(r > 0.1 for name, r in zip(NAMES, ratios, strict=True) if name != "v"), ratios


def test_keeps_the_values_and_saves_qkv_only_for_norms(device):
    args, _ = problem(2, 9, 4, 2, 8, torch.float32, device)
    q, _, v = rope(*args, impl="triton")
    assert v.data_ptr() == args[0][:, :, 6:].data_ptr()
    assert not any(t is not None and t.data_ptr() == args[0].data_ptr() for t in q.grad_fn.saved_tensors)


@pytest.mark.parametrize("layout", ["qkv", "one", "columns"])
def test_gradients_of_any_layout(layout, device, poison):
    args, dy = problem(2, 9, 4, 2, 8, torch.float32, device, norm=True)
    if layout == "qkv":
        dy = torch.cat(dy, 2).split((4, 2, 2), 2)
    elif layout == "one":
        dy = [torch.ones((), device=device).expand_as(t) for t in dy]
    else:
        dy = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in dy]
    for name, a, b in zip(NAMES, results(args, dy), truth(args, dy), strict=True):
        check(a, b, 1e-5, name)


def test_inputs_of_any_layout(device, poison):
    """qkv, tables and weights with gaps between their values."""
    args, dy = problem(2, 9, 4, 2, 8, torch.float32, device, norm=True, positions=True)
    args = [
        t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
        for t in args
    ]
    assert not any(t.is_contiguous() for t in args if torch.is_tensor(t))
    for name, a, b in zip(NAMES, results(args, dy), truth(args, dy), strict=True):
        check(a, b, 1e-5, name)


def test_an_unused_output_has_no_gradient(device):
    args, dy = problem(2, 9, 4, 2, 8, torch.float32, device)
    _, k, _ = rope(*args, impl="triton")
    (dqkv,) = torch.autograd.grad(k, args[0], dy[1])
    assert (dqkv[:, :, :4] == 0).all() and (dqkv[:, :, 4:6] != 0).any() and (dqkv[:, :, 6:] == 0).all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_fullgraph_compile_and_opcheck(norm, dynamic, device):
    args, dy = problem(2, 9, 4, 2, 8, torch.float32, device, norm)
    plain = [t.detach() if torch.is_tensor(t) else t for t in args]
    qkv, cos, sin, n_heads, q_weight, k_weight, eps = plain
    torch.library.opcheck(torch.ops.moe_kernels.rope_fwd, (qkv, cos, sin, q_weight, k_weight, n_heads, eps))
    torch.library.opcheck(
        torch.ops.moe_kernels.rope_bwd, (*dy, qkv if norm else None, cos, sin, q_weight, k_weight, eps)
    )

    def layer(w, qkv, *rest):  # as in the model: what comes before is differentiated too
        return rope(w * qkv, *rest, impl="triton")

    w = torch.ones_like(qkv).requires_grad_()
    leaves, found = [w, *(t for t in args if torch.is_tensor(t) and t.requires_grad)], []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        out = run(w, *args)
        found.append((*out, *torch.autograd.grad(out, leaves, dy)))
    assert all(map(torch.equal, *found))


def test_bad_shapes_are_named(device):
    args, _ = problem(2, 9, 4, 2, 8, torch.float32, device)
    cases = (
        ({0: args[0][0]}, "expected"),
        ({3: 5}, "expected"),
        ({0: args[0].long()}, "int64"),
        ({0: args[0][..., :7]}, "expected"),
        ({1: args[1][:3]}, "cos"),
        ({4: args[1][0, 0]}, "weight"),
    )
    for changed, match in cases:
        with pytest.raises(ValueError, match=match):
            rope(*(changed.get(i, arg) for i, arg in enumerate(args)))
    with pytest.raises(ValueError, match="float64"):
        rope(args[0].double(), *args[1:], impl="triton")


def test_reference_is_the_complex_product():
    (qkv, cos, sin, *rest), _ = problem(2, 9, 4, 2, 8, torch.float64, "cpu")
    q, k, v = reference.rope(qkv, cos, sin, *rest)
    turn = torch.polar(torch.ones(9, 1, 4), torch.arange(9)[:, None, None] * 1e4 ** (-torch.arange(4) / 4)).to(
        torch.complex128
    )
    z = torch.complex(qkv[:, :, :6, :4], qkv[:, :, :6, 4:]) * turn
    check(torch.cat([q, k], 2), torch.cat([z.real, z.imag], 3), 1e-6)
    assert torch.equal(v, qkv[:, :, 6:])


def test_same_bits_every_time(device):
    args, dy = problem(2, 40, 4, 2, 8, torch.float32, device, norm=True)
    assert all(torch.equal(a, b) for a, b in zip(results(args, dy), results(args, dy), strict=True))
