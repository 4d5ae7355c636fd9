"""Scripts that measure the package: `python benchmarks/NAME.py`, and `python -m benchmarks.accelerator`."""
