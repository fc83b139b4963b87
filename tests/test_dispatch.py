"""Counting sort, tile table and the weighted sum back to tokens: python -m pytest tests/test_dispatch.py."""

import pytest
import torch

from moe_kernels import reference
from moe_kernels.dispatch import CHUNK, ONE_LAUNCH, combine, dispatch
from moe_kernels.tiles import max_tiles
from tests.checks import ON_GPU, check, rms_ratio

SHAPES = [(70, 8, 2), (700, 24, 5), (5, 256, 16), (1, 1, 1), (0, 8, 2), (CHUNK, 3, 3)]
BORDERS = [n + more for n in (CHUNK, ONE_LAUNCH, 16384) for more in (-1, 0, 1)]


def choices(T, E, K, device):
    g = torch.Generator().manual_seed(T)
    return torch.rand(T, E, generator=g).argsort(1)[:, :K].int().contiguous().to(device)


@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("T,E,K", SHAPES)
def test_sort_and_tiles(T, E, K, block_m, device, poison):
    experts = choices(T, E, K, device)
    got, truth = dispatch(experts, E, block_m), reference.dispatch(experts, E)
    assert all(map(torch.equal, got[:3], truth))
    offsets = truth[0]
    order = offsets.diff().sort(descending=True, stable=True).indices
    assert torch.equal(got.by_size.long(), torch.stack([order, offsets[order], offsets[order + 1]])) or T == 0
    bounds = offsets.tolist()
    tiles = [(e, row) for e in range(E) for row in range(bounds[e], bounds[e + 1], block_m)]
    n = int(got.tile_count)
    assert list(zip(got.tile_expert[:n].tolist(), got.tile_row[:n].tolist(), strict=True)) == tiles
    assert n <= max_tiles(T * K, E, block_m) == got.tile_expert.numel()


@pytest.mark.parametrize("S,E", [(1, 1), (CHUNK + 1, 7), *((S, 128) for S in BORDERS)])
def test_one_launch_and_several_give_the_same_bits(S, E, device, poison, monkeypatch):
    if not ON_GPU:  # the interpreter takes seconds for a chunk
        S, E = -(-S // 32), min(E, 8)
        monkeypatch.setattr("moe_kernels.dispatch.CHUNK", 16)
    experts = choices(S, E, 1, device)
    monkeypatch.setattr("moe_kernels.dispatch.ONE_LAUNCH", S)
    one = dispatch(experts, E, 32)
    monkeypatch.setattr("moe_kernels.dispatch.ONE_LAUNCH", 0)
    several = dispatch(experts, E, 32)
    for name, a, b in zip(one._fields, one, several, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(one.row_slot_S, reference.dispatch(experts, E)[1])


def test_one_expert_takes_everything(device, poison):
    experts = torch.full((3 * CHUNK + 1, 1), 5, dtype=torch.int32, device=device)
    got = dispatch(experts, 9, 64)
    assert torch.equal(got.row_slot_S.cpu(), torch.arange(3 * CHUNK + 1, dtype=torch.int32))
    assert got.offsets.tolist() == [0] * 6 + [3 * CHUNK + 1] * 4


@pytest.mark.parametrize("T,D,K", [(9, 48, 3), (4, 4112, 1), (0, 16, 2), (33, 16, 8)])
def test_combine(T, D, K, device, poison):
    g = torch.Generator().manual_seed(D)
    y = torch.randn(T * K, D, generator=g).to(device)
    gates = torch.rand(T, K, generator=g).to(device)
    parts = torch.randn(3, T * K, generator=g).to(device)
    slot_row = torch.randperm(T * K, generator=g).view(T, K).int().to(device)
    out, dgates = combine(y, slot_row, gates, parts)
    check(out, reference.combine(y.double(), slot_row, gates.double()), 1e-6)
    check(dgates, parts.double().sum(0)[slot_row.long()], 1e-6)
    check(combine(y, slot_row)[0], reference.combine(y.double(), slot_row), 1e-6)


def test_the_check_can_fail(device):
    experts = choices(50, 8, 2, device)
    got, (_, row_slot, _) = dispatch(experts, 8, 16), reference.dispatch(experts, 8)
    assert not torch.equal(got.row_slot_S.flip(0), row_slot)
    y, gates = torch.randn(100, 16, device=device), torch.rand(50, 2, device=device)
    truth = reference.combine(y, got.slot_row_TK, gates)
    assert rms_ratio(combine(y, got.slot_row_TK.flip(0), gates)[0], truth) > 0.1
