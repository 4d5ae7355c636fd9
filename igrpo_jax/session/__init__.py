"""A run from its configuration to its first step: what it is made of, read, checked and opened.

In order: task, overview, progress, run, opening.
"""
