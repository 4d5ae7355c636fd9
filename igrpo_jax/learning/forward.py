"""The log-probs of a micro-batch's completions: one function that the loss and the rescoring share.

With unchanged parameters, the loss's ratio of the policy to rescored pi_old is therefore 1 up to rounding, which can
differ because a completion may stand at another place in another micro-batch.
"""

from dataclasses import dataclass

import jax

from igrpo_jax.learning.packing import TrainBatch
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.logprobs import packed_logprobs


@dataclass(frozen=True)
class PolicyLogprobs:
    """The log-probs of a micro-batch's completions as a function of the trained parameters."""

    cfg: DecoderConfig
    dtype: str
    temperature: float
    chunk: int  # positions whose logits are computed at once
    remat: str
    lora_scaling: float

    def __call__(
        self, params: decoder.Params, batch: TrainBatch, frozen: decoder.Params, entropy_gradient: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns log-probs and entropies [S, F] float32, in nats; `frozen` is what LoRA adapts."""
        return packed_logprobs(
            self.cfg,
            lora.attach(frozen, params, self.lora_scaling),
            batch.tokens,
            batch.targets,
            batch.segments,
            batch.completion_tokens,
            dtype=self.dtype,
            temperature=self.temperature,
            chunk=self.chunk,
            remat=self.remat,
            entropy_gradient=entropy_gradient,
        )


def rescore(policy: PolicyLogprobs, params: decoder.Params, batch: TrainBatch, frozen: decoder.Params) -> jax.Array:
    """Returns log-probs [S, F] float32 of a micro-batch, in nats; values off the completions are meaningless."""
    return policy(params, batch, frozen)[0]
