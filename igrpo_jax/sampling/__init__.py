"""The sampler: completions of queued prompts, drawn in slots that are refilled.

In order: draw, steps, programs, engine, scheduler, scoring.
"""
