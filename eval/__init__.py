"""Evaluation: generation, tasks and scores. Imports the model and the kernels, never the training loop."""

import optimoe.threads  # before torch
