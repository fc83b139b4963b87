"""What train.py and grpo.py share: configuration, runs, checkpoints, optimisers, several GPUs, models of others."""

import optimoe.threads
