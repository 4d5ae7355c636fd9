"""The two stages that sample groups (Algorithm 1), the objectives, and the update.

In order: objectives, filtering, credit, exchange, selection, stages, rollout, micro_shapes, packing, forward, loss,
optimizer, train_state, programs, rescoring, update_metrics, learner, diagnostics, supervised, warm_start.
"""
