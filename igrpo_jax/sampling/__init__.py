"""The sampler: completions of queued prompts, drawn in slots that are refilled, with a cache of pages.

In order: draw, pages, shapes, layout, state, lockstep, steps, decoding, programs, page_count, inputs, row_sync,
weights, engine, configured, requests, shard, scheduler, scoring.
"""
