"""Problems from files, the hub or a built-in task, and the prompts that are made of them.

In order: readers, messages, columns, overlap, catalog, choices, drawing, arithmetic, lookups, builtin, order,
problems, drafts, solutions, pinning, templates, prompts.
"""
