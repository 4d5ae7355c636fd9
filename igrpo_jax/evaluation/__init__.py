"""Benchmarks: single-shot answers, pass@k with intervals, in a run or on their own.

In order: measures, results, planning, summaries, evaluator, inference.
"""
