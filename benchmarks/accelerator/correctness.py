"""The parts `correctness` and `float32`: this backend against the reference, and its programs against each other.

1. Logits, log-probs, entropies and gradients in float32 with full precision, in float32 as it comes (TF32 on a GPU,
   bfloat16 passes on a TPU; a CPU has full precision only) and in bfloat16, against the reference of a CPU in float32.
2. Every attention implementation that runs here against xla, in the same dtype.
3. The tokens that the sampler draws greedily against the largest logit of the full forward pass.
4. One iGRPO step twice from the same weights.

`correctness` makes the checks in bfloat16, and `float32` the others. Each check has figures, tolerances of the same
names, and `passed`. A check that raises has failed.
"""

import argparse
import dataclasses
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import models
import numpy as np
import step
import two_stage

from benchmarks.accelerator import reference

if TYPE_CHECKING:
    from benchmarks.accelerator.part import Task

# In float32 the errors of a CPU are below 1e-5. In bfloat16 on a CPU they are, for 30 layers, less than half of these.
CLOSE = {"logits": 1e-3, "logprob": 1e-3, "largest": 2e-3, "entropy": 1e-3, "gradient": 1e-3, "norms": 1e-3}
ROUNDED = {"logits": 0.15, "logprob": 0.08, "largest": 0.4, "entropy": 0.01, "gradient": 0.25, "norms": 5e-3}
TOLERANCES = {"float32, full precision": CLOSE, "float32": ROUNDED, "bfloat16": ROUNDED}


def run(task: "Task") -> None:
    """Runs the checks whose results are missing."""
    model = Checked(task.sizes.checked_shape)
    for case, check in model.checks().items():
        if task.has(case) or ("bfloat16" in case) != (task.part == "correctness"):
            continue
        try:
            figures, tolerances = check()
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            task.add(case, {"passed": False, "error": f"{type(error).__name__}: {lines[0][:300]}"})
            continue
        passed = all(figures[name] <= most for name, most in tolerances.items())  # NaN is not
        task.add(case, {"passed": passed, "tolerances": tolerances} | figures)


class Checked:
    """The model of the reference, its weights on the devices, and its checks."""

    def __init__(self, shape: str):
        import jax

        from igrpo_jax import config
        from igrpo_jax.distributed import sharding
        from igrpo_jax.models.config import from_hf

        self.shape = shape
        self.cfg = from_hf(models.SHAPES[shape], shape)
        self.data = reference.batch(self.cfg.vocab_size)
        self.expected = reference.read(shape)
        count = int(np.gcd(reference.CONTEXTS, jax.device_count()))  # which divide the contexts
        self.mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:count])
        weights = reference.params(self.cfg)
        self.same_weights = reference.checksum(weights, self.data) == int(self.expected["checksum"])
        self.weights = {
            path: jax.device_put(value, sharding.param_sharding(self.mesh, path)) for path, value in weights.items()
        }
        self.computed: dict[tuple[str, str], dict[str, np.ndarray]] = {}  # by attention and precision

    def checks(self) -> dict[str, Callable[[], tuple[dict, dict]]]:
        """Returns the checks by their names; each returns figures and tolerances."""
        precisions = [how for how in TOLERANCES if how != "float32" or self.mesh.devices.flat[0].platform != "cpu"]
        checks = {f"{how} against the CPU": lambda how=how: self.against_cpu(how) for how in precisions}
        for name, precision in attentions(self.mesh, self.cfg.head_dim):
            checks[f"{name} attention, {precision}"] = lambda name=name, how=precision: self.attention(name, how)
        for dtype in ("float32", "bfloat16"):
            checks[f"greedy sampling, {dtype}"] = lambda dtype=dtype: self.greedy(dtype)
        return checks | {"one step twice": self.twice}

    def outputs(self, attention: str, precision: str) -> dict[str, np.ndarray]:
        """Returns the outputs of the reference, computed here; computed once."""
        import jax

        key = (attention, precision)
        if key not in self.computed:
            cfg = dataclasses.replace(self.cfg, attention=attention)
            with jax.set_mesh(self.mesh), jax.default_matmul_precision(matmuls(precision)):
                self.computed[key] = reference.outputs(cfg, self.weights, self.data, precision.partition(",")[0])
        return self.computed[key]

    def against_cpu(self, precision: str) -> tuple[dict, dict]:
        if not self.same_weights:
            raise AssertionError("numpy draws other weights here than in the reference; nothing can be compared")
        return errors(self.outputs("xla", precision), self.expected), TOLERANCES[precision]

    def attention(self, name: str, precision: str) -> tuple[dict, dict]:
        return errors(self.outputs(name, precision), self.outputs("xla", precision)), TOLERANCES[precision]

    def greedy(self, dtype: str) -> tuple[dict, dict]:
        """Compares each token that the sampler draws at temperature 0 with the logits of the full forward pass.

        `gap` is how far its logit is below the largest, in standard deviations of the logits; rounding may exchange
        two that are almost equal.
        """
        import jax

        precision = "float32, full precision" if dtype == "float32" else dtype
        with jax.default_matmul_precision(matmuls(precision)):
            samples = self._sampled(dtype)
            logits = self._forced(samples, dtype)
        drawn = np.stack([sample.tokens for sample in samples])
        own = np.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
        gap = (logits.max(-1) - own) / logits.std()
        logprob = own - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) - logits.max(-1)
        difference = np.abs(logprob - np.stack([sample.logprobs for sample in samples]))
        figures = {"gap": gap.max(), "logprob": difference.max(), "other_tokens": int((gap > 0).sum())}
        close = dtype == "float32"
        return _floats(figures), {"gap": 1e-3, "logprob": 1e-3} if close else {"gap": 0.3, "logprob": 0.4}

    def _sampled(self, dtype: str) -> list:
        """Returns one greedy Sample of each context, in their order, by the attention that a run has here."""
        from igrpo_jax.models import attention
        from igrpo_jax.sampling.configured import make_programs
        from igrpo_jax.sampling.engine import Engine
        from igrpo_jax.sampling.requests import Request
        from igrpo_jax.sampling.scheduler import Scheduler
        from igrpo_jax.sampling.state import Sampling

        lengths = {"longest_prompt": reference.PREFIX, "max_completion": reference.COMPLETION}
        never = (self.cfg.vocab_size,)  # an EOS that is not drawn
        own = attention.choose("auto", self.mesh, dtype, self.cfg.head_dim)
        cfg = dataclasses.replace(self.cfg, attention=own)
        sizes = {"slots": reference.CONTEXTS, "steps_per_dispatch": 8, **lengths}
        programs = make_programs(cfg, self.mesh, never, **sizes, dtype=dtype)
        scheduler = Scheduler(Engine(cfg, self.mesh, programs))
        scheduler.start(self.weights, Sampling(0.0))
        key = np.zeros(2, np.uint32)
        for number, (row, length) in enumerate(zip(self.data.prefix, self.data.length, strict=True)):
            scheduler.submit(Request(row[:length], number, 1, key, reference.COMPLETION))
        samples = sorted(scheduler.drain(), key=lambda sample: sample.request.index)
        scheduler.finish()
        return samples

    def _forced(self, samples: list, dtype: str) -> np.ndarray:
        """Returns the logits [Q, T, V] float32 that predict each token of `samples`, by one forward pass."""
        import jax
        import jax.numpy as jnp

        from igrpo_jax.models import decoder

        rows = np.zeros((len(samples), reference.PREFIX + reference.COMPLETION), np.int32)
        for row, sample in zip(rows, samples, strict=True):
            text = np.concatenate([sample.request.tokens, sample.tokens])
            row[: len(text)] = text

        def forward(weights, rows, length):
            cast = decoder.cast(weights, dtype)
            positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
            hidden, _ = decoder.apply(self.cfg, cast, rows, positions)
            at = length[:, None] - 1 + jnp.arange(reference.COMPLETION)
            return decoder.logits(self.cfg, cast, jnp.take_along_axis(hidden, at[:, :, None], axis=1))

        with jax.set_mesh(self.mesh):
            return np.asarray(jax.jit(forward)(self.weights, rows, self.data.length))

    def twice(self) -> tuple[dict, dict]:
        """Makes one iGRPO step twice from the same weights, in float32 and without streaming.

        The schedule is then the same, so that `other_bits`, the share of parameters that differ at all, is 0 on a
        backend whose sums always run in the same order. Tokens must be equal, and the loss but for rounding.
        """
        import jax

        args = argparse.Namespace(
            model=None, shape=self.shape, prompts=2, drafts=2, generations=2, prompt_len=16, new_tokens=16, slots=0,
            mean_length=8, right=0.0, seeds=1, dtype="float32", steps=1,
        )  # fmt: skip
        (lengths,) = two_stage.length_sets(args)
        slots = -(-args.prompts * args.drafts // jax.device_count()) * jax.device_count()
        steps = []
        with two_stage.make_stages(args, args.drafts, args.generations, slots, streamed=False) as stages:
            made = step.Step(args, stages)
            for _ in range(2):
                made.reset()
                made.run(lengths, 0)
                steps.append((_tokens(made.groups), made.metrics["loss"], jax.device_get(made.state.params)))
        (tokens, loss, first), (again, loss_again, second) = steps
        other_bits = sum(int((first[path] != second[path]).sum()) for path in first)
        figures = {
            "other_tokens": sum(int((a != b).sum()) for a, b in zip(tokens, again, strict=True)),
            "loss": abs(loss - loss_again),
            "other_bits": other_bits / sum(value.size for value in first.values()),
            "deterministic": other_bits == 0,
        }
        return figures, {"other_tokens": 0, "loss": 1e-5}


def _tokens(groups: list) -> list[np.ndarray]:
    """Returns the tokens of all drafts and refinements."""
    return [part.tokens for group in groups for part in (*group.drafts, *group.completions)]


def matmuls(precision: str) -> str:
    """Returns JAX's name of the precision of matmuls."""
    return "highest" if precision.endswith("full precision") else "default"


def attentions(mesh, head_dim: int) -> list[tuple[str, str]]:
    """Returns the attention implementations that run on `mesh`, but for xla, each with the precisions that it has."""
    from igrpo_jax.errors import InputError
    from igrpo_jax.models import attention

    found = []
    for name in attention.PACKED:
        for precision in ("float32, full precision", "bfloat16"):
            try:
                attention.choose(name, mesh, precision.partition(",")[0], head_dim)
            except InputError:
                continue
            if name not in ("xla", "splash_interpret"):
                found.append((name, precision))
    return found


def errors(computed: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns how far `computed` is from `expected`, both as in `reference`.

    logits      root mean square of the differences, over the standard deviation of the logits
    logprob     mean of the absolute differences, in nats; `largest` is the largest of them
    entropy     largest difference, in nats
    gradient    norm of the difference of the entries, over their norm
    norms       largest difference of the norms of a parameter's gradient, over the largest norm
    """
    names = ("logits", "logprob", "entropy", "slices", "norms")
    difference = {name: np.abs(computed[name].astype(np.float64) - expected[name]) for name in names}
    return _floats(
        {
            "logits": np.sqrt(np.mean(difference["logits"] ** 2)) / expected["logits"].std(),
            "logprob": difference["logprob"].mean(),
            "largest": difference["logprob"].max(),
            "entropy": difference["entropy"].max(),
            "gradient": np.linalg.norm(difference["slices"]) / np.linalg.norm(expected["slices"]),
            "norms": difference["norms"].max() / expected["norms"].max(),
        }
    )


def _floats(figures: dict[str, Any]) -> dict[str, float]:
    """Returns the figures as Python numbers with few digits; those that are not finite stay as they are."""
    return {name: float(f"{value:.3g}") for name, value in figures.items()}
