"""Compiles, without a GPU, every kernel that the layer launches, and reads from the machine code what decides its speed.

`TRITON_INTERPRET=0 python -m tests.offline T,D,F,E,K ...` prints one JSON row per kernel of each layer shape (bfloat16).
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_kernels.precompile import Driver

SHARED_LIMIT = 232448  # bytes of shared memory a block may use on compute capability 9.0


class Compiled(NamedTuple):
    name: str
    registers: int
    spilled: int  # bytes of spill stores per thread
    shared: int  # bytes per block
    wgmma: int  # tensor core instructions in the PTX
    async_copies: int  # asynchronous global-to-shared copies and TMA loads in the PTX
    wide: int  # loads and stores of 16 bytes in the PTX
    narrow: int  # other loads and stores, of global memory like those


def resources(kernel, capability):
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        log = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", ptx.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    number = lambda pattern: int(re.search(pattern, log).group(1))  # noqa: E731
    text = kernel.asm["ptx"]
    return Compiled(
        kernel.metadata.name,
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores"),
        kernel.metadata.shared,
        text.count("wgmma.mma_async"),
        text.count("cp.async.cg") + text.count("cp.async.bulk.tensor"),
        *(len(re.findall(rf"\b(?:ld|st)\.global[.\w:]*(?<{sign}\.v4\.b32)\s", text)) for sign in "=!"),
    )


@contextlib.contextmanager
def compile_only(capability=90):
    """Inside, launching a kernel compiles it for `capability` and runs nothing; yields the list that fills with `Compiled` rows."""
    compiled, launch = [], JITFunction.__getitem__

    def record(kernel, grid):
        def compile_instead(*args, **kwargs):
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            if binary.hash not in seen:
                seen.add(binary.hash)
                compiled.append(resources(binary, capability))

        return compile_instead

    seen = set()
    before = driver._active
    driver.set_active(Driver(capability))
    JITFunction.__getitem__ = record
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = launch
        driver._active = before  # reset_active() would look for a GPU


def compile_layer(T, D, F, E, K, dtype=torch.bfloat16):
    """Rows of every kernel of one training step through routing, experts, a dense layer, rotations with and without norms, the loss, AdamW (float32,
    with bfloat16 copies, all in bfloat16) and, where maps are small, Muon."""
    from moe_kernels import activation, adamw, cross_entropy, experts, muon, rotary, routing

    empty = torch.empty
    x, w_in, w_out, gates = (
        empty(T, D, dtype=dtype),
        empty(E, 2 * F, D, dtype=dtype),
        empty(E, D, F, dtype=dtype),
        empty(T, K),
    )
    with compile_only() as rows:
        routed = routing.route_fwd(empty(T, E, dtype=dtype), None, K, False, True)
        routing.route_bwd(empty(T, E, dtype=dtype), routed[1], gates, gates, routed[3], routed[4], False, True)
        h = empty(T, 2 * F, dtype=dtype)
        for name in activation.ACTIVATIONS:
            out = experts.experts_fwd(x, w_in, w_out, gates, routed[1], name)
            experts.experts_bwd(x, x, w_in, w_out, gates, *out[1:], name)
            activation.gated_bwd(h, activation.gated_fwd(h, name), name)
        for heads, d in ((12, 64), (4, 128)):
            qkv, table, weight = empty(1, T, heads + 8, d, dtype=dtype), empty(T, 1, d), empty(d)
            for norms in ((None, None), (weight, weight)):
                q, k = rotary.rope_fwd(qkv, table, table, *norms, heads, 1e-5)
                rotary.rope_bwd(q, k, k, qkv if norms[0] is not None else None, table, table, *norms, 1e-5)
        cross_entropy.cross_entropy_op._init_fn(
            empty(8, 16, dtype=dtype), empty(50304, 16), empty(8, dtype=torch.int64), 8, True
        )
        for weights, grad, copy in (
            (empty(E, D), empty(E, D), None),
            (empty(E, D), empty(E, D, dtype=dtype), empty(E, D, dtype=dtype)),
            (empty(E, D, dtype=dtype), empty(E, D, dtype=dtype), None),
        ):
            scalars = [empty(()) for _ in range(4)]  # step, lr, scale, skip
            adamw.launch(weights, grad, weights, weights, *scalars, 0.9, 0.99, 1e-8, 0.1, copy, 0)
        for shape, maps in (((E, 2 * F, D), [F, F]), ((E, D, F), [D])):
            if muon.fits(shape, maps):
                muon.muon_update(
                    *([empty(shape)] * 4 for _ in range(3)), maps, empty(()), 0.95, 0.1, empty(()), empty(()), True
                )
    return rows


if __name__ == "__main__":
    for shape in sys.argv[1:]:
        for row in compile_layer(*map(int, shape.split(","))):
            print(json.dumps({"shape": shape, **row._asdict()}))
