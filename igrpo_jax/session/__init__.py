"""A run outside of its updates: its parts, how it is opened, what it reports and saves.

In order: surroundings, task, progress, overview, ending, run, supervised, opening.
"""
