"""Microbenchmarks: `python -m bench.kernels`, `bench.layer`, `bench.step`; plots with `bench.plot`; `bench.compare` finds regressions."""
