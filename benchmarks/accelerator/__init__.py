"""Measures everything on an accelerator with one command, `python -m benchmarks.accelerator --out DIR`.

The parent process (`__main__`, `plan`, `results`, `table`) never imports jax. Each part is a process of its own.

In order: results, table, plan, sizes, device, reference, correctness, decoding, updating, stepping, peers, tracing,
part, __main__.
"""

import sys
from pathlib import Path

# The scripts of benchmarks/ import each other by bare names, and so do the modules here.
sys.path.insert(0, str(Path(__file__).parents[1]))
