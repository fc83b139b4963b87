"""Evaluation: generation, tasks and scores. Imports the model and the kernels, never the training loop."""

import optimoe as optimoe  # before torch: how its threads wait
