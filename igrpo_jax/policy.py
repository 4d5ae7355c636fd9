"""The model a run starts from: its shape, tokenizer, EOS set and weights, from Hugging Face files or built in."""

from dataclasses import dataclass

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from igrpo_jax import config
from igrpo_jax.models import config as model_config
from igrpo_jax.models import decoder, hf
from igrpo_jax.models.config import ModelConfig
from igrpo_jax.tasks import arithmetic


@dataclass(frozen=True)
class Policy:
    path: str  # empty = the built-in model
    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]

    def load(self, mesh: jax.sharding.Mesh, seed: int) -> decoder.Params:
        """float32 weights in their shardings; random ones, from the seed, for the built-in model."""
        if self.path:
            return hf.load_params(self.path, self.model, mesh)
        return decoder.init(self.model, jax.random.key(seed), mesh)

    def encode_completion(self, text: str) -> np.ndarray:
        """[T] int32 ids of `text` with an EOS."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array([*ids, self.tokenizer.eos_token_id], np.int32)


def open_policy(settings: config.Model) -> Policy:
    """Reads what describes the model and checks its files, without reading the weights.

    Raises:
        InputError: no such model, one of a kind that is not supported, or tensors that do not fit it.
    """
    if settings.path:
        model, tokenizer = hf.load_config(settings.path), hf.load_tokenizer(settings.path)
        hf.check_weights(settings.path, model)
        eos_ids = hf.eos_ids(settings.path, tokenizer)
        largest = max(*tokenizer.get_vocab().values(), *eos_ids)
        if largest >= model.vocab_size:
            raise config.InputError(
                f"config.model.path = {settings.path!r}: its tokenizer has ids up to {largest}, its weights a "
                f"vocabulary of {model.vocab_size}; use the weights' own tokenizer, or resize the embeddings"
            )
        return Policy(settings.path, model, tokenizer, eos_ids)
    tokenizer = arithmetic.tokenizer()
    padded = -(-len(tokenizer) // 16) * 16  # the vocabulary divides over a tensor axis
    return Policy("", model_config.builtin(settings.builtin, padded), tokenizer, (tokenizer.eos_token_id,))
