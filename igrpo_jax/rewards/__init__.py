"""How good a completion is: rewards, the worker processes that compute them, and the judge. Never imports jax.

In order: format, pool, verdicts, judge_messages, judge, functions, custom, rules, verifier, grade.
"""
