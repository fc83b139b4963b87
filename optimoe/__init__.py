"""What train.py and grpo.py share: configurations, runs, checkpoints, optimisers, several GPUs, other people's models."""

import optimoe.threads
