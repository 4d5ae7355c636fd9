"""When two mathematical answers are equal, and what the answer of a text is. Pure Python.

In order: exact, functions, tokens, expression, nodes, regions, words, answers, symbolic, extraction, grader.
"""
