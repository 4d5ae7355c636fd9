"""The model that a run starts from, built in or from Hugging Face files: shape, tokenizer, EOS ids, and its weights.

`Policy.save` and `Policy.save_adapter` write it back as a Hugging Face directory.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from igrpo_jax.config import Config, DataConfig, LoraConfig, ModelConfig
from igrpo_jax.data import arithmetic, pinning
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.models import attention, decoder, hf_files, hf_read, hf_tables, hf_write, lora
from igrpo_jax.models import config as model_config
from igrpo_jax.models.config import DecoderConfig

Report = Callable[[int], None]


PROBE = 8  # tokens of a row whose logits are compared
MOST_LOST = 0.1  # largest part of LoRA's change that rounding may lose in an export for which no dtype was given


@dataclass(frozen=True)
class Comparison:
    """How an export differs from the trained policy."""

    dtype: str
    lost: float  # part of LoRA's change that rounding lost, 0 to about 1; 0 without LoRA (see `lora.lost_by`)
    difference: float  # largest difference of two logits, both computed in float32
    largest: float  # largest logit

    def __str__(self) -> str:
        lost = f"{self.dtype} lost {self.lost:.1%} of LoRA's change, and " if self.lost else ""
        if not self.difference:
            return f"{lost}it gives the trained policy's logits in a probe of {PROBE} tokens"
        return (
            f"{lost}its logits differ from the trained policy's by up to {self.difference:.2g} in a probe of {PROBE} "
            f"tokens (the largest is {self.largest:.3g})"
        )


@dataclass(frozen=True)
class Policy:
    """The shape, tokenizer and EOS ids of a policy. It holds no weights, but loads and saves them.

    The weights travel next to it as `params`, in a TrainState or in a sampler.
    """

    path: str  # empty = the built-in model
    cfg: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    file_bytes: int = 0  # bytes of the weights' files, which `load` reads
    template: str = ""  # the chat template with the run's values of its variables, which `save` writes

    @property
    def fingerprint(self) -> str:
        """A hash of the files of the weights (`hf_read.weights_fingerprint`); "" for the built-in model."""
        return hf_read.weights_fingerprint(self.path) if self.path else ""

    @property
    def prompt_hashes(self) -> dict[str, str]:
        """Hashes of the files' chat template and tokenizer, which make tokens of a prompt; {} for the built-in model.

        Values of the template's variables don't count: `data` has them.
        """
        if not self.path:
            return {}
        template = hashlib.sha256(pinning.template_of(self.tokenizer).encode()).hexdigest()
        return {"chat_template": template, "tokenizer": hf_files.tokenizer_fingerprint(self.path)}

    def load(
        self, mesh: jax.sharding.Mesh, seed: int, dtype: str = "float32", report: Report = lambda bytes_done: None
    ) -> decoder.Params:
        """Returns the weights in their shardings; for the built-in model random ones, drawn from the seed.

        `report` receives the bytes read so far.
        """
        if self.path:
            return hf_read.load_params(self.path, self.cfg, mesh, dtype, report)
        return decoder.cast(decoder.init(self.cfg, jax.random.key(seed), mesh), dtype)

    def encode_completion(self, text: str) -> np.ndarray:
        """Returns the [T] int32 ids of `text`, followed by EOS.

        That is the tokenizer's, else the first that the model's files name, else the first of `eos_ids`.

        Raises:
            InputError: there is none.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array([*ids, self._end], np.int32)

    @functools.cached_property
    def _end(self) -> int:
        own = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        named = hf_files.named_eos_ids(self.path) if self.path and not own else []
        if not (found := [*own, *named, *self.eos_ids]):
            raise InputError(
                f"config.model.path = {self.path!r}: no end-of-sequence token; set eos_token_id in "
                "generation_config.json"
            )
        return found[0]

    def save(
        self,
        out: Path,
        params: decoder.Params,
        report: Report = lambda bytes_done: None,
        dtype: str | None = None,
    ) -> Comparison:
        """Writes `params` in `dtype` (None for `export_dtype`) as the complete Hugging Face directory `out`.

        LoRA's changes are merged. The directory is read back before it gets its name, and compared with `params` as
        they are.

        Raises:
            InputError: `out` exists already or can't be written.
            RunError: the weights that were read back give other logits, or the logits are not finite.
        """
        dtype = dtype or export_dtype(params)
        lost, trained, params = lora.lost_by(params, dtype), _probe(self.cfg, params), written(params, dtype)
        with hf_write.new_folder(out) as folder:
            raw = hf_write.exported_config(self.path, self.cfg, dtype)
            hf_write.write_json(folder / "config.json", raw)
            hf_write.write_json(folder / "generation_config.json", hf_write.generation_config(self.path, self.eos_ids))
            self._write_tokenizer(folder)
            entries = hf_tables.table(raw["model_type"], self.cfg)
            hf_write.write_tensors(folder, params, entries, dtype=dtype, report=report)
            before, cfg = _probe(self.cfg, params), hf_files.load_config(str(folder))
            mesh = jax.tree.leaves(params)[0].sharding.mesh
            reread = _probe(cfg, hf_read.load_params(str(folder), cfg, mesh, dtype))
            _check_equal(out, before, reread)
        return Comparison(dtype, lost, float(np.abs(reread - trained).max()), float(np.abs(trained).max()))

    def save_adapter(self, out: Path, settings: LoraConfig, params: decoder.Params) -> None:
        """Writes the adapters of `params` in float32 as a directory for peft, and reads them back as `save` does."""
        changed = {path: x for path, x in params.items() if isinstance(x, lora.Adapted)}
        adapters = {f"{path}/lora_a": x.a for path, x in changed.items()}
        adapters |= {f"{path}/lora_b": x.b for path, x in changed.items()}
        model_type = hf_write.exported_config(self.path, self.cfg, "float32")["model_type"]
        entries = hf_write.adapter_entries(hf_tables.table(model_type, self.cfg), adapters)
        with hf_write.new_folder(out) as folder:
            hf_write.write_json(folder / "adapter_config.json", hf_write.adapter_config(settings, self.path, entries))
            self._write_tokenizer(folder)
            hf_write.write_tensors(folder, adapters, entries, "adapter_model", dtype="float32")
            again = hf_read.load_adapters(str(folder), entries, adapters)
            reread = lora.attach({path: x.weight for path, x in changed.items()}, again, settings.scaling)
            _check_equal(out, _probe(self.cfg, params), _probe(self.cfg, params | reread))

    def _write_tokenizer(self, folder: Path) -> None:
        if self.path:
            is_changed = self.template != pinning.template_of(self.tokenizer)
            hf_write.copy_tokenizer(self.path, folder, self.template if is_changed else "")
        elif jax.process_index() == 0:
            self.tokenizer.save_pretrained(folder)


def export_dtype(params: decoder.Params) -> str:
    """Returns the dtype in which `params` are exported where none is asked for.

    It is the dtype that they have. With LoRA it is bfloat16, or float32 where rounding would lose more than MOST_LOST
    of the change.
    """
    if not lora.detach(params)[0]:
        return str(next(iter(params.values())).dtype)
    return "float32" if lora.lost_by(params, "bfloat16") > MOST_LOST else "bfloat16"


def written(params: decoder.Params, dtype: str) -> decoder.Params:
    """Returns `params` as `Policy.save` writes them: in `dtype`, with LoRA's changes merged."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    shardings = {path: sharding.param_sharding(mesh, path) for path in params}
    return jax.jit(lambda x: decoder.cast(lora.merge(x), dtype), out_shardings=shardings)(params)


def open_policy(settings: ModelConfig, data: DataConfig | None = None) -> Policy:
    """Returns the policy that `settings` name, with the chat template that `data` describes, or its own.

    Checks its files but does not read the weights.

    Raises:
        InputError: no such model, a kind of model that is not supported, or tensors that do not fit the model.
    """
    if settings.path:
        cfg, tokenizer = hf_files.load_config(settings.path), hf_files.load_tokenizer(settings.path)
        size = hf_read.check_weights(settings.path, cfg)
        eos_ids = hf_files.eos_ids(settings.path, tokenizer)
        largest = max(*tokenizer.get_vocab().values(), *eos_ids)
        if largest >= cfg.vocab_size:
            raise InputError(
                f"config.model.path = {settings.path!r}: its tokenizer has ids up to {largest}, its weights a "
                f"vocabulary of {cfg.vocab_size}; use the weights' own tokenizer, or resize the embeddings"
            )
        return Policy(settings.path, cfg, tokenizer, eos_ids, size, _template(tokenizer, data or DataConfig()))
    tokenizer = arithmetic.tokenizer()
    padded = -(-len(tokenizer) // 16) * 16  # so that the mesh's tensor axis divides the vocabulary
    return Policy("", model_config.builtin(settings.builtin, padded), tokenizer, (tokenizer.eos_token_id,))


def open_model(config: Config, recorded_date: str | None = None) -> tuple[Config, Policy, Renderer]:
    """Returns the policy of config.model and the renderer of its prompts, which know their day; reads no weights.

    Args:
        recorded_date: the day that the run or the evaluation recorded when it began; None if it begins now.

    Returns:
        `config` with the day in data.template_date where the chat template asks for it, policy and renderer.

    Raises:
        InputError: as `open_policy`; a chat template that does not fit the settings.
    """
    policy = open_policy(config.model, config.data)
    config = replace(config, data=pinning.dated(config.data, policy.tokenizer, recorded_date))
    policy = replace(policy, template=_template(policy.tokenizer, config.data))
    renderer = Renderer(policy.tokenizer, config.data, config.refine, config.draft_limit, policy.eos_ids)
    return config, policy, renderer


def _template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    return pinning.pinned(pinning.template_of(tokenizer), data.template_kwargs, data.template_date)


def fit_to_mesh(config: Config, cfg: DecoderConfig, mesh: jax.sharding.Mesh) -> DecoderConfig:
    """Returns `cfg` with the attention (config.learner.attention) on `mesh`.

    Raises:
        InputError: the mesh does not divide the model; an attention that can't run there.
    """
    sharding.check_divides(mesh, decoder.shapes(cfg))
    chosen = attention.choose(config.learner.attention, mesh, config.model.dtype, cfg.head_dim)
    return replace(cfg, attention=chosen)


def _probe(cfg: DecoderConfig, params: decoder.Params) -> np.ndarray:
    """Returns the logits [B, PROBE, V] float32 of a few tokens from all over the vocabulary.

    They are computed in float32, so that two of them differ only by the weights.
    """
    cfg = replace(cfg, attention="xla")  # the other implementations need longer rows
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    shape = (sharding.batch_shards(mesh), PROBE)
    tokens = (np.arange(np.prod(shape), dtype=np.int64) * 7919 % cfg.vocab_size).astype(np.int32).reshape(shape)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)

    def logits(params: decoder.Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        params = decoder.cast(lora.merge(params), "float32")
        return decoder.logits(cfg, params, decoder.apply(cfg, params, tokens, positions)[0])

    with jax.set_mesh(mesh):
        run = jax.jit(logits, out_shardings=sharding.replicated(mesh))
        return sharding.to_host(run(params, *sharding.to_global((tokens, positions), sharding.batch_sharding(mesh))))


def _check_equal(out: Path, written: np.ndarray, reread: np.ndarray) -> None:
    """Raises RunError if the logits that were read back differ from those written, or are not finite."""
    if not np.isfinite(written).all():
        raise RunError(f"{out}: not written: the policy's logits are not finite; export an earlier --step")
    gap, scale = float(np.abs(written - reread).max()), float(np.abs(written).max())
    if not gap <= 1e-3 * scale:
        raise RunError(
            f"{out}: not written: read back, its logits are off by {gap:g} (of {scale:g}); is the disk faulty?"
        )
