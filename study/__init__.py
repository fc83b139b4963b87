"""The study: sweeps over sparsity, verdicts on claims, figures; a planner; pictures of runs."""

import optimoe.threads  # before torch
