"""What a run writes and prints: files, checkpoints, metrics, trackers and the console.

In order: files, workdir, checksums, checkpoint_mirror, checkpoint_reading, checkpoint, alerts, lines, tensorboard,
services, trackers, metrics, writer, console, weights, evaluation_settings, card, hub.
"""
