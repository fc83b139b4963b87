"""Run a module in a process that ends with the process PARENT:  python -m study.child PARENT MODULE WORD...

A killed process cannot end its children; they would wait for their next task for ever.
"""

import os
import runpy
import sys
import threading
import time


def end_with(parent):
    """End this process as soon as process `parent`, which must have started it, is gone. Returns at once."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
