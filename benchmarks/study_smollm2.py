"""The part of matched_budget.py that is about SmolLM2 (placeholder)."""
