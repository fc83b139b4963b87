"""Compiles the kernels of a layer for any NVIDIA architecture, without a GPU, and shows what their speed depends on.

    python -m bench.compile 32768,2048,768,128,8 --arch=sm_90 --all --out=DIR

prints a row per kernel: registers and spilled bytes of a thread, shared memory of a block, and the numbers in its PTX
of tensor core products (wgmma or mma), asynchronous copies, TMA loads, proxy fences, and global accesses of 16 bytes
(wide) or less (narrow). The exit code is 1 if a kernel spills registers, does not fit into the shared memory of the
architecture, or makes ptxas warn, for example of serialised wgmma.
A shape is T,D,F,E,K: tokens, model width, expert hidden width, experts, experts per token.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar, Literal

import torch
import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from bench.problem import empty_inputs, parse_shape, run_kernels
from moe_kernels import activation, adamw, cross_entropy, decode, muon, rms_norm, rotary, routing
from moe_kernels.norm import square_of
from moe_kernels.precompile import compile_only
from moe_kernels.tiles import LIMITS, interpreting
from optimoe import config

ARCHITECTURES = tuple(f"sm_{capability}" for capability in LIMITS)
# (kernel, its argument TRANSPOSED): what this launch computes.
USES = {
    ("rows_kernel", True): "down",
    ("rows_kernel", False): "dx",
    ("dw_kernel", False): "dw_out",
    ("dw_kernel", True): "dw_in",
}
# What is counted in the PTX: its pattern.
COUNTS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma": r"\bmma\.sync|\btcgen05\.mma",
    "copies": r"\bcp\.async\.c[ag]\.[^;]*, 0x10\b",  # of 16 bytes, for rows; narrower ones are for indices
    "tma": r"\bcp\.async\.bulk\.tensor",
    "fences": r"\bfence\.proxy\.async",
    "wide": r"\b(?:ld|st)\.global[.\w:]*(?<=\.v4\.b32)\s",
    "narrow": r"\b(?:ld|st)\.global[.\w:]*(?<!\.v4\.b32)\s",
}


@dataclass(frozen=True)
class Config:
    POSITIONAL: ClassVar = ("shapes",)
    shapes: tuple[str, ...]  # layer shapes T,D,F,E,K
    arch: tuple[Literal[ARCHITECTURES], ...] = ("sm_90",)  # architectures to compile for
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of activations and weights
    all: bool = False  # also routing, a dense layer, norms, rotary embeddings, the loss, generation, optimisers
    json: bool = False  # print JSON rows instead of a table
    out: str = ""  # directory for the PTX and SASS of every kernel

    def __post_init__(self):
        for shape in self.shapes:
            parse_shape(shape)
        config.require(not interpreting(), "TRITON_INTERPRET", "1", "the interpreter compiles nothing; unset it")


def launch_rest(shape, dtype):
    """Launches all other kernels in all their variants; Muon's only where its matrices are small."""
    T, D, F, E, K = shape
    empty, half, V = torch.empty, torch.bfloat16, 50304
    for sigmoid, normalize in ((False, True), (True, False)):
        logits = empty(T, E, dtype=dtype)
        gates, ids, _, probs, z = routing.route_fwd(logits, None, K, sigmoid, normalize)
        routing.route_bwd(logits, ids, gates, gates, probs, z, sigmoid, normalize)
    h = empty(T, 2 * F, dtype=dtype)
    for name in activation.ACTIVATIONS:
        activation.gated_bwd(h, activation.gated_fwd(h, name), name)
    x, weight = empty(T, D, dtype=dtype), empty(D)
    total, normed = rms_norm.add_norm_fwd(x, x, weight, 1e-5)
    rms_norm.add_norm_bwd(total, normed, normed, total, weight, 1e-5)
    for heads, d in ((12, 64), (4, 128)):
        qkv, table, weight = empty(1, T, heads + 8, d, dtype=dtype), empty(T, 1, d), empty(d)
        for norms in ((None, None), (weight, weight)):
            q, k = rotary.rope_fwd(qkv, table, table, *norms, heads, 1e-5)
            rotary.rope_bwd(q, k, k, qkv if norms[0] is not None else None, table, table, *norms, 1e-5)
    for vocabulary in (V, 257):  # a multiple of 8, and a small odd number
        x, w, targets = empty(8, 16, dtype=dtype), empty(vocabulary, 16), empty(8, dtype=torch.int64)
        cross_entropy.cross_entropy_op._init_fn(x, w, targets, 8, True)
    for rows in (1, min(T, 64)):  # generation
        norm, ids = empty(D, dtype=dtype), empty(rows, K, dtype=torch.int32)
        x, q, cache = (empty(*size, dtype=dtype) for size in ((rows, D), (rows, 12, 64), (rows, 256, 4, 64)))
        table, written = empty(256, 1, 64), empty(rows, 8, dtype=torch.int64)
        decode.linear(x, empty(V, D, dtype=dtype), norm, 1e-5)
        decode.linear(x, empty(D, D, dtype=dtype), add=x)
        decode.attend(q, table, table, written[:, 0].contiguous(), cache, cache, 4)
        decode.route_few(x, norm, 1e-5, empty(E, D, dtype=dtype), K)
        decode.experts(x, empty(E, 2 * F, D, dtype=dtype), empty(E, D, F, dtype=dtype), empty(rows, K), ids, x)
        decode.greedy(empty(rows, V, dtype=dtype), None, written, written, written)
    for kind in (half, torch.float32):
        square_of([empty(E, D, dtype=kind)])
    scalars = [empty(()) for _ in range(4)]  # step, learning rate, scale, skip
    for weight_type, grad_type, copied in ((None, None, False), (None, half, True), (half, half, False)):
        weight, grad = empty(E, D, dtype=weight_type), empty(E, D, dtype=grad_type)
        copy = empty(E, D, dtype=half) if copied else None
        adamw.launch(weight, grad, weight, weight, *scalars, 0.9, 0.99, 1e-8, 0.1, copy, 0)
    for sizes, rows in (((E, 2 * F, D), [F, F]), ((E, D, F), [D])):
        if muon.fits(sizes, rows):
            tensors = ([empty(sizes)] * 4 for _ in range(3))
            muon.muon_update(*tensors, rows, empty(()), 0.95, 0.1, empty(()), empty(()), True)


def assemble(kernel, capability):
    """What ptxas prints about a kernel, with Triton's options; Triton itself throws it away."""
    with tempfile.TemporaryDirectory() as directory:
        ptx = Path(directory, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        command += [f"--output-file={ptx.with_suffix('.cubin')}", ptx]
        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
            command.append("--regAllocOptLevel=2")
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        remedy = f"it refuses {kernel.metadata.name}: {done.stderr}"
        config.require(not done.returncode, "ptxas", done.returncode, remedy)
        return done.stderr


def inspect(kernel, capability):
    """What `main` prints of a compiled kernel, as a dict."""
    log, ptx, arguments = assemble(kernel, capability), kernel.asm["ptx"], kernel.src.fn.arg_names
    const = {arguments[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    number = lambda pattern: int(re.search(pattern, log).group(1))
    name = kernel.metadata.name
    plain = name.replace("_hopper", "")
    row = {
        "name": name,
        "use": USES.get((plain, const.get("TRANSPOSED")), plain.removesuffix("_kernel")),
        "tile": "x".join(str(const[key]) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if key in const),
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": number(r"Used (\d+) registers"),
        "spilled": number(r"(\d+) bytes spill stores"),
        "shared": kernel.metadata.shared,
        **{what: len(re.findall(pattern, ptx)) for what, pattern in COUNTS.items()},
    }
    warned = (line for line in log.splitlines() if re.search(r"warning|\bC7\d\d\d\b", line))
    over = row["shared"] - LIMITS[capability].shared
    problems = sorted({line.split("for gpu")[0].strip() for line in warned})
    problems += [f"spills {row['spilled']} bytes a thread"] if row["spilled"] else []
    problems += [f"{over} bytes of shared memory too many"] if over > 0 else []
    return row | {"problems": problems}


def save_code(kernel, folder, stem):
    """Writes the PTX, the machine code and its disassembly."""
    folder.mkdir(parents=True, exist_ok=True)
    cubin = folder / f"{stem}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (folder / f"{stem}.ptx").write_text(kernel.asm["ptx"])
    sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", cubin], capture_output=True, text=True, check=True).stdout
    (folder / f"{stem}.sass").write_text(sass)


def compile_shape(cfg, text, arch):
    """The rows of one shape and architecture; runs in a separate process."""
    shape, capability, dtype = parse_shape(text), int(arch.removeprefix("sm_")), getattr(torch, cfg.dtype)
    with compile_only(capability) as kernels:
        run_kernels(empty_inputs(shape, dtype))
        if cfg.all:
            launch_rest(shape, dtype)
    rows = []
    for i, kernel in enumerate(kernels):
        row = {"shape": text, "arch": arch, "triton": triton.__version__, **inspect(kernel, capability)}
        rows.append(row)
        if cfg.out:
            save_code(kernel, Path(cfg.out, f"{text}-{arch}"), f"{i:02d}-{row['use']}")
    return rows


def table(rows):
    """Rows of dicts as a Markdown table with aligned columns."""
    columns = [key for key in rows[0] if key not in ("name", "triton")]
    cells = [[", ".join(v) if isinstance(v := row[key], list) else str(v) for key in columns] for row in rows]
    cells.insert(0, columns)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def main(argv=None):
    cfg = config.parse(Config, argv, __doc__)
    # torch.compile changes Triton's ptxas while a process runs, so the usual cache may have PTX too new for this ptxas.
    knobs.cache.dir = str(Path(knobs.cache.dir, "offline"))
    if cfg.out:
        config.make_directory(cfg.out, "out", cfg.out)
    shapes, archs = zip(*product(cfg.shapes, cfg.arch), strict=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("fork")) as pool:
        rows = [row for rows in pool.map(partial(compile_shape, cfg), shapes, archs) for row in rows]
    if cfg.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        print(f"triton {triton.__version__}, {cfg.dtype}\n\n{table(rows)}")
    if problems := sum(bool(row["problems"]) for row in rows):
        sys.exit(f"error: {problems} of {len(rows)} kernels have problems, see the last column")


if __name__ == "__main__":
    config.command_line(main)
