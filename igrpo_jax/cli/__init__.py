"""What all commands share: flags become a checked configuration, and errors one line and an exit code.

Nothing here imports jax at module level: the verifier's workers import the main module again.

In order: flag_errors, parsing, exits.
"""
