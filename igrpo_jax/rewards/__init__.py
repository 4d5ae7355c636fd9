"""How good a completion is: rewards, the worker processes that compute them, and the judge. Never imports jax.

In order: format, main_guard, worker_start, pool, verdicts, judge_messages, endpoint, judge, functions, failures,
custom, rules, verifier, worker_image, grade.
"""
