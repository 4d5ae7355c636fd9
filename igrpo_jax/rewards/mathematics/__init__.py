"""When two mathematical answers are equal, and what the answer of a text is. Pure Python.

In order: exact, roots, functions, spelling, tokens, plus_minus, spoken, units, numerals, derivatives, expression,
nodes, regions, words, names, leaves, letters, rounding, answers, symbolic, sentences, extraction, golds, comparison,
grader.
"""
