"""iGRPO (arXiv 2602.09000) in JAX and Flax: two-stage, self-feedback reinforcement learning for reasoning models.

From Python, in a notebook or a program, five functions do what the commands do; the commands call them too:

    from igrpo_jax import load_config, train_model, evaluate_model, generate_answers, make_report

Importing igrpo_jax imports nothing else. The module of a function, and jax with it, is imported where it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# The module of each public function, and its name there.
API = {
    "load_config": ("igrpo_jax.loading", "load_config"),
    "train_model": ("igrpo_jax.train", "train"),
    "evaluate_model": ("igrpo_jax.evaluate", "evaluate"),
    "generate_answers": ("igrpo_jax.generate", "generate"),
    "make_report": ("igrpo_jax.report.pages", "build"),
}

__all__ = [*API]


def __getattr__(name: str) -> Any:
    """Returns a function of API."""
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = API[name]
    return getattr(importlib.import_module(module), function)


def __dir__() -> list[str]:
    """Returns the names that completion offers."""
    return [*globals(), *API]
