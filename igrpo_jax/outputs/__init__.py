"""What a run leaves behind and says: files, checkpoints, metrics, trackers and the console.

In order: workdir, checkpoint, weights, trackers, metrics, alerts, console.
"""
