"""The sampler: continuous batching with a paged KV cache. Slots are refilled from a queue, prompts are prefilled in
chunks, and the samples of a prompt share its pages (prefix sharing).

In order: draw, pages, shapes, layout, state, lockstep, steps, decoding, programs, page_count, configured, inputs,
row_sync, weights, engine, requests, shard, scheduler, scoring.
"""
