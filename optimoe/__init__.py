"""What train.py and grpo.py share: configuration, runs, checkpoints, optimisers, several GPUs, models of others."""

import os

# Threads of torch wait for one another by spinning, for about a millisecond. If another process holds a core, they spin
# in vain and a tenth of the idle speed or less remains (docs/LOG.md). With this setting they sleep after a short spin.
# It is read once, when torch is imported, so programs import this package first. What a user has set is left alone.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
