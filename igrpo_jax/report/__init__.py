"""The pages that show a run: `python -m igrpo_jax.report`.

In order: runs, samples, summary, versus, plots, table, panels, figures, charts, settings, pages, __main__.
"""
