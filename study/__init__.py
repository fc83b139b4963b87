"""Sweeps over sparsity, figures, and what people look at while and after a model trains."""

import optimoe.threads  # before torch
