"""Problems from files, the hub or the built-in task, and the prompts that are made of them.

In order: readers, messages, columns, overlap, catalog, choices, arithmetic, problems, pinning, templates, prompts.
"""
