"""What a run writes and prints: files, checkpoints, metrics, trackers and the console.

In order: files, workdir, checksums, checkpoint, trackers, metrics, writer, alerts, lines, console, weights.
"""
