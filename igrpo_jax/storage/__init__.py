"""Folders of runs, models and problems that lie in a bucket, `gs://` or `s3://`, wherever a path goes.

In order: addresses, reading, writing, lease.
"""
