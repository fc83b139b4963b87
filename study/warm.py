"""Compiles the kernels of a sweep's runs into Triton's cache while its workers still import and load, on spare cores:

    python -m study.warm --capability=90 --vocab=1344 128,64,256,2 128,64,4,1       # d_model, d_expert, E, k

study/sweep.py starts it and never waits for it: what is not there in time, or differs from what a model launches, is compiled when it is needed.
"""

import argparse
import os
from functools import partial

import torch

from moe_kernels import cross_entropy, experts, muon, routing
from moe_kernels.precompile import precompile

TRAINING = 8192  # tokens of a step
MEASURING = (2**14, 2**15)  # and of the batches in which losses and answers are measured


def compile_run(D, F, E, K, vocab):
    """A task of `precompile`: launches, on empty tensors, what a run launches."""
    new, floats = partial(torch.empty, dtype=torch.bfloat16), torch.empty
    w_in, w_out = new(E, 2 * F, D), new(E, D, F)
    for T in (TRAINING, *MEASURING):
        x, logits, gates = new(T, D), new(T, E), floats(T, K)
        routed = routing.route_fwd(logits, None, K, False, True)
        sorted_ = experts.experts_fwd(x, w_in, w_out, gates, routed[1])[1:]
        cross_entropy.cross_entropy_op._init_fn(
            new(8, D), floats(vocab, D), torch.empty(8, dtype=torch.int64), 8, T == TRAINING
        )
        if T == TRAINING:
            experts.experts_bwd(x, x, w_in, w_out, gates, *sorted_)
            for z in (floats(()), floats(2)[1]):  # the first layer's gradient of z is aligned, others' are not
                routing.route_bwd(logits, routed[1], gates, gates, routed[3], z, False, True)
    for shape, maps in (((3 * D, D), [D] * 3), ((D, D), [D]), ((E, 2 * F, D), [F, F]), ((E, D, F), [D])):
        if muon.fits(shape, maps):
            muon.muon_update(
                *([floats(shape)] * 4 for _ in range(3)),
                maps,
                floats(()),
                0.95,
                0.1,
                floats(()),
                floats(()),
                len(shape) == 3,
            )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--capability", type=int, required=True, help="90: Hopper")
    parser.add_argument("--vocab", type=int, default=1344)
    args = parser.parse_args(argv)
    os.nice(10)  # the workers go first
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    return max(map(abs, precompile([partial(compile_run, *shape, args.vocab) for shape in shapes], args.capability)))


if __name__ == "__main__":
    raise SystemExit(main())
