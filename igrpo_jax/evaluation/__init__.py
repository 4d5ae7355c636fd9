"""Benchmarks: single-shot answers, pass@k with intervals, in a run or on their own.

In order: measures, summary_tables, results, comparison, planning, summaries, evaluator, inference.
"""
