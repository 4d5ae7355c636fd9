"""Whether a configuration fits a TPU slice, and what bounds it: `python -m igrpo_jax.aot`.

In order: progress, collectives, footprint, __main__.
"""
