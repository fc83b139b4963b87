"""How the threads of torch wait for one another. torch reads it once, so programs import this module before torch.

By default they spin for about a millisecond. If another process holds a core, that delays both: a quarter of the idle
speed or less remains (docs/LOG.md). After a short spin they sleep. The user's own settings stay."""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
