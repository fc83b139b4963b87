"""Benchmarks of the layer, its kernels, a training step, a node and generation: one CSV schema, peers, plots."""
