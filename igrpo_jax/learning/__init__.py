"""The two stages that sample groups (Algorithm 1), the objectives, and the update.

In order: objectives, exchange, rollout, packing, optimizer, learner, warm_start.
"""
