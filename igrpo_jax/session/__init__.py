"""A run outside of its updates: what it is made of, how it is opened, what it reports and saves.

In order: task, overview, progress, run, opening.
"""
