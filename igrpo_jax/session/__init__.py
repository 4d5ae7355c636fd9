"""A run outside of its updates: its parts, how it is opened, what it reports and saves.

In order: run_context, rehearsal, run_inputs, progress, overview, resuming, beginning, ending, run, sft, opening.
"""
