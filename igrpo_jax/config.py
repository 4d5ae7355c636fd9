"""Every setting of a run, declared once: its name, type, default and meaning.

`default()` gives the `ml_collections.ConfigDict` that a file in `configs/` edits and the command line overrides;
`freeze()` checks it and returns the frozen dataclasses that the rest of the package reads. Nothing here imports jax,
so that a wrong setting is reported before any device is touched. Defaults are the paper's (arXiv 2602.09000, Table
S.2).
"""

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any

import ml_collections
from ml_collections import config_dict

from igrpo_jax.errors import InputError


@dataclass(frozen=True)
class BuiltinModelConfig:
    """Shape of the small decoder that is used where `model.path` is empty."""

    hidden_size: int = 128  # of the residual stream
    num_layers: int = 4  # of attention and MLP each
    num_heads: int = 4  # query heads of hidden_size / num_heads each
    num_kv_heads: int = 2  # key and value heads, shared by query heads
    intermediate_size: int = 384  # of the MLP
    max_position_embeddings: int = 1024  # context in tokens: prompt, draft and completion together


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: they alone are trained, and the model's own weights stay as they are, in model.dtype."""

    rank: int = 0  # of a weight's change; 0 = off, all weights are trained
    alpha: float = 32.0  # a change is scaled by alpha / rank
    targets: tuple[str, ...] = ("all-linear",)  # weights to adapt, as "q_proj"; all-linear = all but embedding and head

    @property
    def scaling(self) -> float:
        return self.alpha / max(self.rank, 1)


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""  # Hugging Face directory or hub id; empty = the built-in character-level decoder
    dtype: str = "bfloat16"  # compute and rollout dtype: "bfloat16" or "float32"; trained weights are float32
    builtin: BuiltinModelConfig = field(default_factory=BuiltinModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ArithmeticConfig:
    """The built-in task: sums of several terms, worked out step by step."""

    min_terms: int = 3  # fewest numbers of a sum
    max_terms: int = 5  # most
    max_operand: int = 9  # operands are 1..max_operand
    max_total: int = 20  # running totals stay within 0..max_total
    train_problems: int = 4096  # to train on
    test_problems: int = 256  # of the benchmark "arithmetic", none of them in training


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # math, acereason-math, openr1-math-220k, gsm8k; or a file, a folder of files, or a hub id with
    # training problems; empty = the built-in arithmetic task
    subset: str = ""  # of a hub id: its "configuration"; empty = the default one
    split: str = "train"  # of a hub id, or of a folder whose files are named after splits
    prompt_column: str = ""  # a dot reaches into nested ones; empty = found by name: prompt, problem, question, input
    answer_column: str = ""  # empty = found by name: answer, solution, ground_truth, output, reward_model.ground_truth
    clean: bool = False  # leave out problems without an answer, repeated ones, and those that evaluation asks for too
    max_prompt_length: int = (
        1024  # tokens of the question with its chat template; longer prompts are skipped and counted
    )
    instruction: str = (
        "Solve the problem. First reason step by step inside <think> and </think>, then give only the final answer "
        "inside <answer> and </answer>."
    )  # put before every question
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised start of the built-in model from a noisy teacher; never runs where `model.path` is set."""

    steps: int = 0  # 0 = off
    batch_size: int = 32  # examples per step
    learning_rate: float = 1.5e-3  # peak, after a tenth of the steps; then a cosine to 0
    error_rate: float = 0.2  # chance that the result of one of the teacher's steps is random
    draft_fraction: float = 0.5  # share of examples that show a draft in the prompt
    draft_error_rate: float = 1.0  # the same for the drafts that are shown; 1 = nothing in them can be trusted


LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "gspo", "gspo_token")  # those of algorithms.OBJECTIVES


@dataclass(frozen=True)
class AlgorithmConfig:
    loss_type: str = "grpo"  # grpo, dr_grpo, dapo, gspo, gspo_token
    num_drafts: int = 4  # N, Stage 1 drafts per prompt; 0 = no draft stage (the base algorithm)
    num_generations: int = 4  # G, trained completions per prompt
    # The next four are departures from the paper, off by default.
    draft_dropout: float = 0.0  # share of groups that see the plain prompt in Stage 2
    draft_selection: str = "best"  # which draft enters q', of those with a verdict: "best", "random", "worst", "first"
    draft_early_stop: bool = False  # drafts of a prompt are drawn one by one, until one has the largest possible reward
    train_drafts: bool = False  # drafts are trained on too: groups of their own on the plain prompt, in the same update
    max_redraws: int = 0  # fresh prompts in the place of one whose completions all earn the same (DAPO's dynamic
    # sampling), at most so many for each of prompts_per_step; 0 = off
    beta: float = 0.0  # KL coefficient; 0 keeps no reference model in memory
    epsilon: float | None = None  # lower clip; None = the objective's own
    epsilon_high: float | None = None  # upper clip; None = epsilon if that is set, else the objective's own
    delta: float | None = None  # dual clip: upper bound of the ratio where the advantage is negative, such as 3.0
    entropy_coef: float = 0.0  # entropy bonus: this times the mean entropy of the trained tokens, in nats
    baseline: str = "mean"  # subtracted from rewards: "mean" of the group, or "leave_one_out": of the others (RLOO)
    num_iterations: int = 1  # passes over one rollout
    scale_rewards: str | None = (
        None  # divide advantages by the std of "group" or "batch", or "none"; None = the objective's own
    )
    importance_sampling_cap: float = 0.0  # weigh tokens by min(pi_old / pi_sampler, cap), as TRL does; 0 = off
    mask_truncated_completions: bool = False  # completions cut at the length limit carry no loss


@dataclass(frozen=True)
class RefineConfig:
    template: str = (
        "embed"  # how the draft enters q'; "embed" (inside the user turn, after the question) is the only one
    )
    max_draft_length: int | None = (
        None  # tokens of the draft kept in q' (its tail); None = rollout.max_completion_length
    )
    instruction: str = (
        "Below is an earlier draft answer to this problem. Treat it as guidance, not as truth: it may be wrong. Give a "
        "strictly better final answer: fix its mistakes, fill its gaps, justify each step and be clearer. Do not "
        "repeat it; where it is wrong, correct it and go on.\n\n<draft>\n{draft}\n</draft>"
    )  # put after the question; the draft's tokens go where {draft} stands


@dataclass(frozen=True)
class RolloutConfig:
    max_completion_length: int = 4096  # tokens, of drafts and of refinements, EOS included
    temperature: float = 0.7  # of drafts and refinements; the trainer's log-probs are at it too
    top_p: float = 1.0  # nucleus of which tokens are drawn; below 1 the trainer, which sees all, is another policy
    top_k: int = 0  # most likely tokens of which one is drawn, the same holds; 0 = off
    slots: int = 64  # completions decoded at once
    steps_per_dispatch: int = 16  # tokens per slot between two looks of the host
    dispatches_ahead: int | None = None  # 1 = the device decodes on while the host looks; None = 1, on CPU 0
    streamed: bool = True  # refine a prompt while others still draft; False waits for all drafts (for comparisons)


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that scores answers in [0, 1]."""

    weight: float = 0.0  # of the judge's score in the reward; 0 = no judge
    model: str = ""  # as the endpoint names it
    base_url: str = ""  # such as http://localhost:8000/v1; empty = the openai client's own (OPENAI_BASE_URL or OpenAI)
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; the key itself is never stored
    instruction: str = (
        "Grade the answer to a mathematics problem. 1 means that the final answer is right and the reasoning is sound, "
        "0 that the answer is wrong or missing; give partial credit in between for reasoning that comes near."
    )  # what the judge is told to look at; the form of its reply is added
    show_reference: bool = True  # put the reference answer before the judge
    temperature: float | None = 0.0  # None = not sent, for models that refuse any but their own
    max_tokens: int = 1024  # of the judge's reply, its reasoning included
    timeout: float = 60.0  # seconds one request may take
    max_retries: int = 4  # further attempts after a time-out, a rate limit or a broken connection, with back-off
    concurrency: int = 16  # requests in flight at once
    budget: int = 0  # requests per step, retries included; what is left over has no verdict; 0 = no limit
    cache: str = ""  # file of the verdicts, shared by the runs that name it; empty = WORKDIR/judge.sqlite


@dataclass(frozen=True)
class RewardsConfig:
    accuracy: float = 1.0  # weight of the accuracy reward
    format: float = 1.0  # weight of the <think>…</think><answer>…</answer> reward
    overlong: float = 0.0  # weight of the soft over-long penalty, 0 down to -1 at rollout.max_completion_length
    overlong_cache: int = 0  # last tokens of that length over which the penalty grows (DAPO's L_cache)
    custom: str = ""  # "module:function" of a reward of your own; empty = none
    custom_weight: float = 1.0  # of that reward
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    workers: int = 2  # verifier processes
    timeout: float = 5.0  # seconds one grading may take before its worker is killed
    max_error_fraction: float = 0.5  # share of gradings per step that may fail or time out before the run stops

    @property
    def largest(self) -> float:
        """The most that a completion can earn, but for a custom reward, whose values have no bound."""
        return self.accuracy + self.format + self.judge.weight


@dataclass(frozen=True)
class LearnerConfig:
    tokens_per_microbatch: int = 16384  # padded tokens of one forward and backward pass on each shard of the batch
    shared_prefix: bool = True  # run a prompt (with its draft) once for all its completions; False is for comparisons
    minibatches: int = 1  # optimizer steps per pass over a rollout
    max_nonfinite_steps: int = 5  # steps in a row whose loss or gradient is not finite before the run stops; each
    # changes nothing and leaves its batch in WORKDIR/nonfinite
    remat: str = "full"  # of each sublayer the backward pass recomputes all ("full"), all but matmuls ("dots"), "none"
    attention: str = "auto"  # "xla", "chunked", "cudnn" (GPU), "splash" (TPU); "auto" chooses by device, dtype, length
    offload_reference: bool = False  # keep pi_ref (beta > 0) in host memory between its forward passes
    logprob_chunk: int | None = (
        None  # completion positions on each shard of the batch whose logits exist at once; None = 128 MiB of them
    )


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-6  # peak
    b1: float = 0.9  # decay of AdamW's first moment
    b2: float = 0.999  # of the second
    weight_decay: float = 0.0  # decoupled; none on biases and norms
    max_grad_norm: float = 1.0  # a larger gradient, of all parameters together, is scaled down to this norm
    mu_dtype: str = "float32"  # of the first moment: "float32" or "bfloat16"; the second stays float32, whose
    # steps of 1 - b2 = 0.001 are below what bfloat16 resolves
    warmup_ratio: float = 0.1  # share of all optimizer steps
    min_lr_ratio: float = 0.1  # floor of the cosine, as a share of learning_rate


@dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # replicas of the weights
    fsdp: int = -1  # weights and batch sharded; -1 = the rest of the devices
    tensor: int = 1  # heads, ffn and vocabulary sharded


@dataclass(frozen=True)
class ClusterConfig:
    """Several processes that run together."""

    start_timeout: float = 300.0  # seconds in which all of them must have come
    silence: float = 30.0  # seconds without a sign of life after which a process counts as lost and the others end


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50  # steps; the last step is always saved; 0 = only the last
    keep: int = 3  # of the newest
    best_metric: str = ""  # such as eval/math500/pass@1: the checkpoint where it was highest is kept too; empty = none
    export: bool = False  # write the policy of the last step to WORKDIR/export too, as a Hugging Face directory
    preemption_grace: float = 25.0  # seconds after SIGTERM by which the run has saved and ended, saved or not


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds without progress after which a wait is named in the log, with the stacks of all threads; 0 = never."""

    verifier: float = 300.0  # for the next verdict
    dispatch: float = 1800.0  # for one call of the sampler, or for one update, with what they must compile
    checkpoint: float = 1800.0  # for a checkpoint to be written or read


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = (
        0  # steps between single-shot evaluations, also run before the first and after the last step; 0 = never
    )
    benchmarks: tuple[str, ...] = ()  # aime24, aime25, math500, amc23, gsm8k, minerva, "arithmetic" (built-in), or the
    # name of a file in data_dir
    samples: int | None = None  # completions per problem; None = the paper's: 64 on AIME, 8 on the others, 1 elsewhere
    rounds: int = 0  # draft -> refine rounds evaluated beside the single shot
    drafts: int = 4  # of the single-shot samples, or of the round before: the first ones, which one draft is chosen of
    limit: int = 0  # first problems of each benchmark; 0 = all
    temperature: float = 0.6  # of evaluation's answers; training's is rollout.temperature
    top_p: float = 0.95  # nucleus of which tokens are drawn
    pass_at: tuple[int, ...] = ()  # k of pass@k and maj@k; empty = 1, 2, 4, 8, ... up to the samples
    max_completion_length: int | None = None  # tokens, cut to the model's context; None = rollout.max_completion_length
    data_dir: str = ""  # folder of NAME.jsonl (.csv, .json, .parquet), used before the hub


@dataclass(frozen=True)
class LogConfig:
    every: int = 1  # steps between console lines
    samples_every: int = 10  # steps between draft -> refinement samples on the console
    trackers: tuple[str, ...] = ("tensorboard",)  # where metrics.jsonl goes too: "tensorboard", "wandb"
    profile_steps: tuple[int, ...] = ()  # steps recorded by the JAX profiler into DIR/profile


@dataclass(frozen=True)
class Config:
    seed: int = 0  # of the order of problems and of all that is sampled
    steps: int = 0  # rollouts; 0 = as many as `epochs` needs
    epochs: float = 1.0  # passes over the training set, where steps = 0
    prompts_per_step: int = 32  # problems of a rollout, each with its drafts and refinements
    compilation_cache: str = "~/.cache/igrpo_jax"  # folder of compiled programs, shared by all runs; empty = none
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def trained_completions(self) -> int:
        """Of a step, where no draft is dropped."""
        drafts = self.algorithm.num_drafts if self.algorithm.train_drafts else 0
        return self.prompts_per_step * (self.algorithm.num_generations + drafts)

    @property
    def draft_limit(self) -> int:
        """Tokens of a draft that q' keeps."""
        return self.refine.max_draft_length or self.rollout.max_completion_length


# Fields that may differ between a run and its resume: how long it runs and what is seen of it, not what it does.
MAY_CHANGE_ON_RESUME = (
    *("steps", "compilation_cache", "cluster", "log", "evaluation", "checkpoint", "watchdog"),
    # What a run that ended for want of memory, of time or of a judge has to change to go on. Results stay the same but
    # for how sums round, and for gradings that had no verdict.
    *("rollout.slots", "learner.tokens_per_microbatch", "learner.logprob_chunk", "learner.remat", "learner.attention"),
    *("learner.offload_reference", "rewards.workers", "rewards.timeout", "rewards.max_error_fraction"),
    *(f"rewards.judge.{name}" for name in ("base_url", "api_key_env", "timeout", "max_retries", "concurrency")),
)


def default() -> ml_collections.ConfigDict:
    """A ConfigDict with every field at its default, for a file in configs/ to edit; `freeze` refuses what it adds."""
    return _to_config_dict(Config())


def freeze(tree: ml_collections.ConfigDict) -> Config:
    """Checks `tree` and returns it as frozen dataclasses.

    Raises:
        InputError: a field is unknown, has the wrong type, or a value that no run can use.
    """
    config = _from_config_dict(Config, tree, "")
    _validate(config)
    return config


def field_paths(cls: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields, for error messages and the configuration reference."""
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        paths.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            paths += field_paths(hint, f"{prefix}{name}.")
    return paths


def check_field(path: str) -> None:
    """Raises InputError, with the nearest right name, where `path` (dotted) is no field."""
    known = field_paths()
    if path not in known:
        # A right last name in the wrong section ("learning_rate") is as common as a misspelling.
        by_leaf = [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]]
        near = difflib.get_close_matches(path, by_leaf or known, n=1, cutoff=0.0)
        raise InputError(f"config.{path}: no such field; the nearest is config.{near[0]}")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, as written to DIR/config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for each field that differs between two `to_dict` results and may not change on resume."""
    rows = []
    for name in sorted(old.keys() | new.keys()):
        if prefix + name in MAY_CHANGE_ON_RESUME:
            continue
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            rows += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            rows.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return rows


def _to_config_dict(node: Any) -> ml_collections.ConfigDict:
    tree = ml_collections.ConfigDict()
    for name, hint in typing.get_type_hints(type(node)).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            value = _to_config_dict(value)
        elif value is None:
            value = config_dict.placeholder(_inner_type(hint))
        tree[name] = value
    return tree


def _from_config_dict(cls: type, tree: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in hints:
            check_field(prefix + name)
    values = {}
    for name, hint in hints.items():
        if name not in tree:
            raise InputError(f"config.{prefix}{name}: missing; start the config file from igrpo_jax.config.default()")
        value = tree[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _from_config_dict(hint, value, f"{prefix}{name}.")
        else:
            values[name] = _checked(value, hint, prefix + name)
    return cls(**values)


def _inner_type(hint: Any) -> type:
    """float for `float | None`, tuple for `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.get_origin(hint) or hint


def _checked(value: Any, hint: Any, path: str) -> Any:
    if value is None and isinstance(hint, types.UnionType):
        return None
    want = _inner_type(hint)
    if want is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if want is tuple and isinstance(value, (list, tuple)):
        value, item = tuple(value), typing.get_args(hint)[0]
        if not all(type(x) is item for x in value):
            raise InputError(f"config.{path} = {value!r}: each entry must be of type {item.__name__}")
    if type(value) is not want:
        raise InputError(f"config.{path} = {value!r}: must be of type {want.__name__}, not {type(value).__name__}")
    return value


def _validate(config: Config) -> None:
    def value_of(path: str) -> Any:
        return functools.reduce(getattr, path.split("."), config)

    def need(ok: bool, path: str, fix: str) -> None:
        if not ok:
            raise InputError(f"config.{path} = {value_of(path)!r}: {fix}")

    def choice(path: str, *allowed: Any) -> None:
        need(value_of(path) in allowed, path, "must be one of " + ", ".join(map(str, allowed)))

    need(config.steps >= 0, "steps", "must be 0 (use epochs) or a number of rollouts")
    need(config.steps > 0 or config.epochs > 0, "epochs", "must be above 0 where steps = 0")
    need(config.seed < 2**31, "seed", "must be below 2**31")
    for path in ("optimizer.b1", "optimizer.b2"):
        need(0 <= value_of(path) < 1, path, "must be at least 0 and below 1")
    for path in ("algorithm.epsilon", "algorithm.epsilon_high", "rewards.judge.temperature"):
        need(value_of(path) is None or value_of(path) >= 0, path, "must be at least 0, or None")
    need(config.optimizer.learning_rate < 1e3, "optimizer.learning_rate", "must be a finite, small number")
    choice("model.dtype", "bfloat16", "float32")
    need(config.model.lora.alpha > 0, "model.lora.alpha", "must be above 0")
    need(
        config.model.lora.rank == 0 or config.model.lora.targets,
        "model.lora.targets",
        "name at least one weight to adapt",
    )
    choice("algorithm.loss_type", *LOSS_TYPES)
    choice("algorithm.draft_selection", "best", "random", "worst", "first")
    choice("algorithm.baseline", "mean", "leave_one_out")
    choice("algorithm.scale_rewards", None, "group", "batch", "none")
    choice("refine.template", "embed")
    choice("learner.remat", "full", "dots", "none")
    choice("learner.attention", "auto", "xla", "chunked", "cudnn", "splash")
    choice("optimizer.mu_dtype", "float32", "bfloat16")
    need(
        config.algorithm.num_generations >= 2,
        "algorithm.num_generations",
        "a group needs at least 2 completions to compare",
    )
    at_least = {
        0: "seed algorithm.num_drafts algorithm.beta algorithm.importance_sampling_cap rollout.temperature "
        "algorithm.max_redraws algorithm.entropy_coef "
        "rollout.top_k warm_start.steps model.lora.rank "
        "rewards.accuracy rewards.format rewards.overlong rewards.overlong_cache rewards.judge.weight "
        "rewards.judge.max_retries rewards.judge.budget optimizer.learning_rate "
        "optimizer.weight_decay evaluation.every evaluation.limit evaluation.temperature evaluation.rounds "
        "checkpoint.every log.samples_every watchdog.verifier watchdog.dispatch watchdog.checkpoint",
        1: "prompts_per_step data.max_prompt_length rollout.max_completion_length rollout.slots evaluation.drafts "
        "rollout.steps_per_dispatch rewards.workers rewards.judge.max_tokens rewards.judge.concurrency "
        "learner.minibatches learner.max_nonfinite_steps checkpoint.keep log.every learner.tokens_per_microbatch "
        "algorithm.num_iterations data.arithmetic.train_problems data.arithmetic.test_problems warm_start.batch_size "
        "data.arithmetic.max_operand data.arithmetic.max_total model.builtin.num_heads model.builtin.num_kv_heads "
        "model.builtin.num_layers",
        2: "data.arithmetic.min_terms algorithm.num_generations",
    }
    for low, paths in at_least.items():
        for path in paths.split():
            need(value_of(path) >= low, path, f"must be at least {low}")
    choice("rollout.dispatches_ahead", None, 0, 1)
    for path in (
        "refine.max_draft_length",
        "evaluation.max_completion_length",
        "evaluation.samples",
        "learner.logprob_chunk",
    ):
        need(value_of(path) is None or value_of(path) >= 1, path, "must be at least 1, or None")
    shares = (
        "warm_start.error_rate warm_start.draft_fraction warm_start.draft_error_rate algorithm.draft_dropout "
        "rewards.max_error_fraction optimizer.warmup_ratio optimizer.min_lr_ratio"
    )
    for path in shares.split():
        need(0 <= value_of(path) <= 1, path, "must be within 0 and 1")
    for path in ("rollout.top_p", "evaluation.top_p"):
        need(0 < value_of(path) <= 1, path, "must be above 0 and at most 1")
    need(config.refine.instruction.count("{draft}") == 1, "refine.instruction", "must hold {draft} exactly once")
    seconds = "rewards.timeout rewards.judge.timeout checkpoint.preemption_grace cluster.start_timeout cluster.silence"
    for path in seconds.split():
        need(value_of(path) > 0, path, "must be a number of seconds above 0")
    rewards, longest = config.rewards, config.rollout.max_completion_length
    need(
        rewards.accuracy + rewards.format + rewards.judge.weight > 0 or (rewards.custom and rewards.custom_weight),
        "rewards.accuracy",
        "with rewards.format, rewards.judge.weight and rewards.custom also unused there is no reward",
    )
    need(
        not rewards.overlong or 1 <= rewards.overlong_cache <= longest,
        "rewards.overlong_cache",
        f"must be between 1 and rollout.max_completion_length = {longest} where rewards.overlong is used",
    )
    need(
        not rewards.custom or re.fullmatch(r"[\w.]+:\w+", rewards.custom),
        "rewards.custom",
        "must be written as module:function",
    )
    need(not rewards.judge.weight or rewards.judge.model, "rewards.judge.model", "name the model of the endpoint")
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", rewards.judge.api_key_env):  # likely the key: not repeated, not written
        raise InputError(
            "config.rewards.judge.api_key_env: must be the name of an environment variable in capitals, such as "
            "OPENAI_API_KEY, and not the key itself; export the key in it"
        )
    need(
        config.optimizer.max_grad_norm > 0,
        "optimizer.max_grad_norm",
        "must be above 0 (a large number switches clipping off)",
    )
    algorithm = config.algorithm
    need(
        not algorithm.train_drafts or algorithm.num_drafts != 1,
        "algorithm.train_drafts",
        "one draft has no other to be compared with; set algorithm.num_drafts to at least 2",
    )
    need(
        not (algorithm.train_drafts and algorithm.draft_early_stop),
        "algorithm.train_drafts",
        "drafts that stop at a success are a biased sample of the policy's; set algorithm.draft_early_stop to False",
    )
    need(
        not (algorithm.draft_early_stop and rewards.custom and rewards.custom_weight),
        "algorithm.draft_early_stop",
        "the largest possible reward is not known with rewards.custom",
    )
    need(algorithm.delta is None or algorithm.delta > 1, "algorithm.delta", "must be above 1 + epsilon_high, or None")
    # Refinements and drafts are dealt out apart, so that every minibatch has its share of both.
    counts = [algorithm.num_generations] + [algorithm.num_drafts] * algorithm.train_drafts
    for rows in [config.prompts_per_step * count for count in counts]:
        fix = f"must divide the {rows} trained completions of a stage per step"
        need(rows % config.learner.minibatches == 0, "learner.minibatches", fix)
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    need(sum(size == -1 for size in sizes) <= 1, "mesh.fsdp", "only one axis may be -1 (the rest of the devices)")
    for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
        need(size == -1 or size >= 1, f"mesh.{axis}", "must be -1 (the rest of the devices) or at least 1")
    arithmetic = config.data.arithmetic
    need(
        arithmetic.max_terms >= arithmetic.min_terms,
        "data.arithmetic.max_terms",
        "must be at least data.arithmetic.min_terms",
    )
    need(
        not config.warm_start.steps or not config.model.path,
        "warm_start.steps",
        "the supervised start is for the built-in model; set it to 0 with model.path",
    )
    need(
        config.model.path or not config.data.train,
        "model.path",
        "data.train needs a model and its tokenizer; the built-in model only knows its own task",
    )
    need(
        config.evaluation.every == 0 or config.evaluation.benchmarks,
        "evaluation.benchmarks",
        "name at least one benchmark, or set evaluation.every to 0",
    )
    known = ("tensorboard", "wandb")
    fix = "each must be one of " + ", ".join(known) + ", once"
    need(set(config.log.trackers) <= set(known), "log.trackers", fix)
    need(len(set(config.log.trackers)) == len(config.log.trackers), "log.trackers", fix)
    need(all(k >= 1 for k in config.evaluation.pass_at), "evaluation.pass_at", "each k must be at least 1")
    need(
        not config.checkpoint.best_metric or config.evaluation.every,
        "checkpoint.best_metric",
        "is a metric of evaluations; set evaluation.every",
    )
