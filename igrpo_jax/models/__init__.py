"""One decoder that a pattern string describes, its weights from and to Hugging Face, and what it costs.

In order: shapes, config, rotary, cache, windows, segments, visits, splash, blocked, cudnn, spans, attention, ragged,
paged_splash, paged, heads, products, layers, tree_scan, lane_scan, mamba2, lora, decoder, sums, logprobs, costs,
hf_tables, hf_paths, hf_tensors, hf_files, hf_read, hf_write, policy.
"""
