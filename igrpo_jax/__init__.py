"""iGRPO (arXiv 2602.09000) in JAX and Flax: two-stage, self-feedback reinforcement learning for reasoning models."""

__version__ = "0.1.0"
