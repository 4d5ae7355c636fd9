"""Runs, models and problems in a bucket, `gs://` or `s3://`, wherever a path is accepted.

In order: addresses, reading, writing, lease.
"""
