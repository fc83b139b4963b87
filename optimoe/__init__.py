"""What train.py and grpo.py share: configurations, runs, checkpoints, optimisers, several GPUs, other people's models."""

import os

# Threads of torch wait for one another by spinning, for about a millisecond. If another process holds a core, that wait is
# in vain and delays both: a tenth of the idle speed or less remains (docs/LOG.md). After a short spin they sleep.
# Read once, when torch is imported, so programs import this package first. What the user has set is left alone.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
