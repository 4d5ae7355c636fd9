"""Whether a configuration fits a TPU slice, and what bounds it: `python -m igrpo_jax.aot`.

In order: progress, slices, collectives, footprint, building, __main__.
"""
