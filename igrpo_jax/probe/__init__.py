"""Whether drafts will pay for a model and its data, measured before any training: `python -m igrpo_jax.probe`.

In order: draft_signal, estimates, conclusion, answers, gradients, page, measure, __main__.
"""
