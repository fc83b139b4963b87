"""Hides triton, as on a machine without it. Tests: python -m pytest -p tests.hide_triton FILES; a program: python -m
tests.hide_triton PROGRAM ARGS."""

import runpy
import sys

sys.modules["triton"] = None  # an import of it now raises ModuleNotFoundError

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, "")
    runpy.run_path(sys.argv[0], run_name="__main__")
