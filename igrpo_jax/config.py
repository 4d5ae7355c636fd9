"""Every setting of a run, declared once: its name, type, default, what values it may have, and its meaning.

In this order: the sections, each before the section that holds it and the whole `Config` last; what may change on
resume; and how a configuration is made and checked. A rule about one field stands next to its type, those between
fields are in `schema.constraints`. The comment above a field is its meaning in docs/configuration.md, which `python
docs/configuration.py` writes.

`default()` gives the `ml_collections.ConfigDict` that a file in `configs/` edits and the command line overrides;
`freeze()` checks it and returns the frozen dataclasses that the rest of the package reads. Nothing here imports jax,
so that a wrong setting is reported before any device is touched. Defaults are the paper's (arXiv 2602.09000, Table
S.2).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import ml_collections

from igrpo_jax.schema import constraints, fields, trees
from igrpo_jax.schema.rules import (
    Above,
    AtLeast,
    AtMost,
    Below,
    Between,
    Choice,
    Each,
    HoldsOnce,
    IsDate,
    Matches,
    Otherwise,
)

Seconds = Annotated[float, Above(0, "a number of seconds above 0")]
AxisSize = Annotated[int, AtLeast(1, "-1 (the rest of the devices) or at least 1", also=-1)]
TemplateValue = bool | int | float | str
# The keys of OBJECTIVES in learning/objectives.py, which this module cannot import; a test compares the two.
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "gspo", "gspo_token")

# What to do with a function, which the processes of the verifier import by its name.
IN_A_FILE = "write the function into a file and name it, as in 'my_rewards:rew'"


@dataclass(frozen=True)
class BuiltinModelConfig:
    """Shape of the small decoder that is used where `model.path` is empty."""

    # Width of the built-in model's residual stream.
    hidden_size: Annotated[int, AtLeast(1)] = 128
    # Number of the built-in model's layers, each of which is an attention and an MLP.
    num_layers: Annotated[int, AtLeast(1)] = 4
    # Number of the built-in model's query heads, each hidden_size / num_heads wide.
    num_heads: Annotated[int, AtLeast(1)] = 4
    # Number of the built-in model's key and value heads, which its query heads share.
    num_kv_heads: Annotated[int, AtLeast(1)] = 2
    # Width of the built-in model's MLP.
    intermediate_size: Annotated[int, AtLeast(1)] = 384
    # Context of the built-in model in tokens: prompt, draft and completion together.
    max_position_embeddings: Annotated[int, AtLeast(1)] = 1024


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters. Only they are trained; the model's own weights stay as they are, in `model.dtype`."""

    # Rank of the change that an adapter makes to a weight; 0 trains all weights, without adapters.
    rank: Annotated[int, AtLeast(0)] = 0
    # Scale of the change that an adapter makes to a weight: it is multiplied by alpha / rank.
    alpha: Annotated[float, Above(0)] = 32.0
    # Weights to adapt, such as "q_proj"; "all-linear" stands for all weights but the embedding and the head.
    targets: tuple[str, ...] = ("all-linear",)

    @property
    def scaling(self) -> float:
        """The factor of a weight's change."""
        return self.alpha / max(self.rank, 1)


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    # Hugging Face directory or hub id; empty for the built-in character-level decoder.
    path: str = ""
    # Dtype of computation and of rollouts; weights that are trained are float32.
    dtype: Annotated[str, Choice("bfloat16", "float32")] = "bfloat16"
    builtin: BuiltinModelConfig = field(default_factory=BuiltinModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ArithmeticConfig:
    """The first built-in task: sums of several terms, worked out step by step."""

    # Smallest number of terms in a sum of the built-in task.
    min_terms: Annotated[int, AtLeast(2)] = 3
    # Largest number of terms in a sum of the built-in task.
    max_terms: int = 5
    # Largest operand in a sum of the built-in task; the smallest is 1.
    max_operand: Annotated[int, AtLeast(1)] = 9
    # Largest running total in a sum of the built-in task; the smallest is 0.
    max_total: Annotated[int, AtLeast(1)] = 20
    # Number of problems of the built-in task to train on.
    train_problems: Annotated[int, AtLeast(1)] = 4096
    # Number of problems in the benchmark "arithmetic"; none of them is trained on.
    test_problems: Annotated[int, AtLeast(1)] = 256


@dataclass(frozen=True)
class LookupsConfig:
    """The second built-in task: a list of look-ups in a fixed table, right only if all of them are."""

    # Number of look-ups in a problem of the task "lookups".
    items: Annotated[int, AtLeast(1)] = 12
    # Number of problems of the task "lookups" to train on.
    train_problems: Annotated[int, AtLeast(1)] = 4096
    # Number of problems in the benchmark "lookups"; none of them is trained on.
    test_problems: Annotated[int, AtLeast(1)] = 256


@dataclass(frozen=True)
class DataConfig:
    """The problems to train on, and how they are put to the model."""

    # Training problems: math, acereason-math, openr1-math-220k or gsm8k; a file, a folder of files, or a hub id; empty
    # for the built-in task that data.task names.
    train: Annotated[str, Otherwise("write the rows to a .jsonl file and give its path")] = ""
    # Built-in task where data.train is empty: "arithmetic", or "lookups", where it is easier to repair a draft than to
    # solve without one.
    task: Annotated[str, Choice("arithmetic", "lookups")] = "arithmetic"
    # Subset of a hub id, which the hub also calls its "configuration"; empty for the default subset.
    subset: str = ""
    # Split of a hub id, or of a folder whose files are named after splits.
    split: str = "train"
    # Column of the question, in which a dot reaches into nested columns and a plus puts columns together; empty finds
    # it by name: prompt, problem, question, instruction+input, input, instruction, messages, conversations.
    prompt_column: str = ""
    # Column of the answer, in which a dot reaches into nested columns; empty finds it by name: answer, solution,
    # ground_truth, output, reward_model.ground_truth; and without these it is the last reply of a chat. A file may have
    # none where rewards.accuracy is 0 and no judge sees the reference answer.
    answer_column: str = ""
    # Whether to leave out problems without an answer or with one that no completion can match, repeated problems, and
    # problems that evaluation asks too.
    clean: bool = False
    # Longest question with its chat template, in tokens; problems with longer ones are skipped and counted.
    max_prompt_length: Annotated[int, AtLeast(1)] = 1024
    # Text that is put before every question.
    instruction: str = (
        "Solve the problem. First reason step by step inside <think> and </think>, then give only the final answer "
        "inside <answer> and </answer>."
    )
    # Text of a system turn before the user's turn, which holds data.instruction and the question; empty for no system
    # turn but the one that the chat template may write itself. To put the instruction there, set it here and set
    # data.instruction to "". A chat template without a system turn is refused.
    system_prompt: str = ""
    # Values for variables of the chat template, such as {"enable_thinking": False} for Qwen3 or
    # {"date_string": "26 Jul 2024"} for Llama 3.2. On the command line the mapping is quoted as in Python.
    template_kwargs: dict[str, TemplateValue] = field(default_factory=dict)
    # Day that the chat template takes for today (strftime_now), such as 2026-01-31. Empty for the day on which the run
    # begins; config.json then has it, so that a resume keeps it.
    template_date: Annotated[str, IsDate()] = ""
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    lookups: LookupsConfig = field(default_factory=LookupsConfig)

    @property
    def answer_name(self) -> str:
        """The name under which custom rewards receive the reference answers."""
        return self.answer_column or "answer"


@dataclass(frozen=True)
class WarmStartConfig:
    """Warm start of the built-in model from a noisy teacher; never runs where `model.path` is set."""

    # Number of steps of the warm start; 0 for none.
    steps: Annotated[int, AtLeast(0)] = 0
    # Number of examples in a step of the warm start.
    batch_size: Annotated[int, AtLeast(1)] = 32
    # Peak learning rate of the warm start, reached after a tenth of its steps; a cosine then takes it to 0.
    learning_rate: Annotated[float, AtLeast(0)] = 1.5e-3
    # Probability that the teacher writes a random result for a step of its solution, or a wrong one for a look-up.
    error_rate: Annotated[float, Between(0, 1)] = 0.2
    # Fraction of the examples of the warm start that show a draft in the prompt.
    draft_fraction: Annotated[float, Between(0, 1)] = 0.5
    # Probability of a random result for a step (a wrong one for a look-up) of a draft that the warm start shows.
    # In the task "arithmetic" nothing in a draft can be trusted at 1.
    draft_error_rate: Annotated[float, Between(0, 1)] = 1.0
    # What the teacher does with a draft: "independent" pays no attention to it; "checked", in the task "lookups", looks
    # up again where its own first look-up differs from the draft; "critiqued", there too, repeats a draft that
    # {verdict} in refine.instruction calls correct, and checks others; "verdicts" says whether the draft is right, as
    # algorithm.second_stage = "verify" asks. With the last two half of the drafts are right.
    refinements: Annotated[str, Choice("independent", "checked", "critiqued", "verdicts")] = "independent"


@dataclass(frozen=True)
class SftConfig:
    """What supervised fine-tuning (SFT) of a model from files imitates (`python -m igrpo_jax.sft`)."""

    # Column of the solutions to imitate, texts or chats that end with a reply; empty takes the replies to the questions
    # where these are such chats, or else finds it by name: solution, generation, response, completion, output, answer.
    solution_column: str = ""
    # Text that is imitated: {solution} is the cell of the solution, {answer} the final answer of the problem. A
    # <think> that the chat template writes itself is left out.
    completion: Annotated[str, HoldsOnce("{solution}")] = "<think>\n{solution}\n</think>\n<answer>{answer}</answer>"
    # Column of drafts to a problem, a text or a list of texts, such as answers that the model gave before.
    draft_column: str = ""
    # In place of a column: the --workdir of a run, of `igrpo_jax.evaluate` or of `igrpo_jax.probe`, or one of their
    # files, whose answers to the plain question are the drafts; also in a bucket.
    drafts_from: str = ""
    # Fraction of the examples whose prompt shows a draft, as Stage 2 of iGRPO does; of problems that have one.
    draft_fraction: Annotated[float, Between(0, 1)] = 0.0


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective and the draft stage; docs/igrpo.md has the equations."""

    # Objective of the update.
    loss_type: Annotated[str, Choice(*LOSS_TYPES)] = "grpo"
    # Number of Stage 1 drafts per prompt, N in the paper; 0 for no draft stage, which is the base algorithm.
    num_drafts: Annotated[int, AtLeast(0)] = 4
    # What Stage 2 asks for: "refine" for a better answer than the draft, "verify" for a verdict on it, 1 if it is right
    # and 0 if it is wrong, which refine.instruction has to ask for. Drafts are then solutions, and are trained on. The
    # latter departs from the paper.
    second_stage: Annotated[str, Choice("refine", "verify")] = "refine"
    # Number of completions per prompt that are trained on, G in the paper.
    # With group = "prompt" it may be 1.
    num_generations: Annotated[int, AtLeast(1)] = 4
    # Fraction of groups that see the plain prompt in Stage 2. Above 0 it departs from the paper.
    draft_dropout: Annotated[float, Between(0, 1)] = 0.0
    # Which of the drafts that have a verdict enters q'. With "refined" each does, with num_generations refinements, and
    # the draft whose refinements earn most is kept with them. "balanced", for second_stage = "verify", is a right one
    # and a wrong one equally often. All but "best" depart from the paper.
    draft_selection: Annotated[str, Choice("best", "random", "worst", "first", "refined", "balanced")] = "best"
    # What draft_selection compares, of refinements where it is "refined": the name of a reward, such as "judge" or your
    # function's, or "reward" for the weighted sum. A function of weight 0 chooses the draft without being trained on.
    # All but "reward" depart from the paper.
    draft_metric: str = "reward"
    # Whether the drafts of a prompt are drawn one after another, until one has the largest possible reward. This
    # departs from the paper.
    draft_early_stop: bool = False
    # Whether drafts are trained on too, as separate groups on the plain prompt, in the same update. This departs
    # from the paper.
    train_drafts: bool = False
    # Which prompts are refined: "always" all of them, "unsolved" those without a right draft. The completions that this
    # saves are drafts of additional prompts, and a step samples as many completions as with "always". Departs from the
    # paper.
    draft_when: Annotated[str, Choice("always", "unsolved")] = "always"
    # Fraction of a prompt's drafts that must be right for it to count as solved where draft_when = "unsolved"; at 0 one
    # right draft is enough.
    solved_fraction: Annotated[float, Between(0, 1)] = 0.0
    # Prompt under which refinements are scored and trained on: the "context" that they were sampled with, which shows a
    # draft, or the "plain" prompt. The latter departs from the paper.
    refine_credit: Annotated[str, Choice("context", "plain")] = "context"
    # Which refinements have an advantage where refine_credit = "plain": the "right" ones, or "all".
    credit_completions: Annotated[str, Choice("right", "all")] = "right"
    # Tokens of refinements enter the loss as p / (p + credit_gamma) where refine_credit = "plain", with p the policy's
    # probability of the token after the plain prompt; 0 for the clipped ratio to the old policy. With 0,
    # importance_sampling_cap weighs them against the sampler, which saw the draft.
    credit_gamma: Annotated[float, AtLeast(0)] = 0.1
    # Completions that share a baseline: those of a "stage", or drafts and refinements of a "prompt" together. The
    # latter departs from the paper.
    group: Annotated[str, Choice("stage", "prompt")] = "stage"
    # Multiple of the reward that a refinement has beyond that of the draft it was shown, which is added to its reward
    # before advantages are computed. Above 0 it departs from the paper.
    improvement_bonus: Annotated[float, AtLeast(0)] = 0.0
    # What is subtracted from the reward of a refinement that states the answer of the wrong draft it was shown, before
    # advantages are computed. Above 0 it departs from the paper.
    repeat_penalty: Annotated[float, AtLeast(0)] = 0.0
    # Whether every other step, from the first on, has no drafts. The step after it refines drafts of the same prompts.
    # This departs from the paper.
    alternate: bool = False
    # Largest number of fresh prompts that may, one after another, replace a prompt whose completions are all right or
    # all wrong (DAPO's dynamic sampling), for each of prompts_per_step; 0 for none. Above 0, such a prompt that could
    # not be replaced has no advantage.
    max_redraws: Annotated[int, AtLeast(0)] = 0
    # What dynamic sampling compares instead of right and wrong: the name of a reward in use, such as "accuracy",
    # "format" or your function's, or "reward" for the weighted sum. None for "accuracy", or for "reward" where
    # rewards.accuracy = 0.
    filter_groups_metric: str | None = None
    # Coefficient of the KL penalty; 0 keeps no reference model in memory.
    beta: Annotated[float, AtLeast(0)] = 0.0
    # Lower clip: the ratio is clipped at 1 - epsilon. None for the objective's own.
    epsilon: Annotated[float | None, AtLeast(0)] = None
    # Upper clip: the ratio is clipped at 1 + epsilon_high. None for epsilon where that is set, else for the
    # objective's own.
    epsilon_high: Annotated[float | None, AtLeast(0)] = None
    # Upper bound of the ratio where the advantage is negative, such as 3.0 (dual clip); None for no bound.
    delta: Annotated[float | None, Above(1, "above 1 + epsilon_high")] = None
    # Coefficient of the entropy bonus, which is the mean entropy of the trained tokens in nats. Where no group has an
    # advantage it is the only gradient: Adam makes whole steps of it, and the policy becomes uniform.
    entropy_coef: Annotated[float, AtLeast(0)] = 0.0
    # What is subtracted from a reward: the "mean" of its group, or that of the group's other rewards ("leave_one_out",
    # RLOO).
    baseline: Annotated[str, Choice("mean", "leave_one_out")] = "mean"
    # Number of passes that an update makes over the completions of a step.
    num_iterations: Annotated[int, AtLeast(1)] = 1
    # Advantages are divided by the standard deviation of the "group" or the "batch", or by nothing ("none"); None for
    # the objective's own.
    scale_rewards: Annotated[str | None, Choice(None, "group", "batch", "none")] = None
    # Tokens are weighted by min(pi_old / pi_sampler, cap), as TRL does; 0 for no weights. Above 0 it needs
    # rollout.top_p = 1 and rollout.top_k = 0.
    importance_sampling_cap: Annotated[float, AtLeast(0)] = 0.0
    # Whether completions that were cut at the length limit carry no loss.
    mask_truncated_completions: bool = False

    @property
    def trained_stages(self) -> tuple[str, ...]:
        """The stages whose completions are trained on. The metrics of the first one have TRL's names."""
        if self.second_stage == "verify":
            return ("draft", "verify")
        return ("refine", "draft") if self.train_drafts else ("refine",)

    def drafts_in(self, step: int) -> int:
        """Returns the number of drafts of each prompt in `step` (from 1)."""
        return 0 if self.alternate and step % 2 else self.num_drafts

    def batches_until(self, step: int) -> int:
        """Returns the number of batches of prompts that the steps up to `step` read; alternating steps share them."""
        return (step + 1) // 2 if self.alternate else step


@dataclass(frozen=True)
class RefineConfig:
    """The augmented prompt q' of Stage 2: how the question and its draft are put to the model."""

    # How the draft enters q': "embed" puts it inside the user turn, after the question.
    template: Annotated[str, Choice("embed")] = "embed"  # nothing here reads it: outside tools name the choice by it
    # Number of tokens of the draft that q' keeps, from its end; None for rollout.max_completion_length.
    max_draft_length: Annotated[int | None, AtLeast(1)] = None
    # Text that is put after the question; the draft's tokens replace {draft}. A critique departs from the paper: the
    # word "correct" or "incorrect", by the draft's answer, replaces {verdict}; evaluations say "unverified".
    instruction: Annotated[str, HoldsOnce("{draft}")] = (
        "Below is an earlier draft answer to this problem. Treat it as guidance, not as truth: it may be wrong. Give a "
        "strictly better final answer: fix its mistakes, fill its gaps, justify each step and be clearer. Do not "
        "repeat it; where it is wrong, correct it and go on.\n\n<draft>\n{draft}\n</draft>"
    )


@dataclass(frozen=True)
class SamplerMeshConfig:
    """The mesh that samples: the devices of the training mesh, with the weights divided in another way."""

    # Number of neighbouring devices that share one copy of the weights to sample with, which are split by heads, MLP
    # and vocabulary; the slots are split over the groups. None for the number with the least time for each token by
    # formula, among those whose groups lie within a slice (of GPUs: a node) and whose weights fit; on CPU for
    # mesh.tensor. The processes of a group that spans several sample in lockstep.
    tensor: Annotated[int | None, AtLeast(1)] = None


@dataclass(frozen=True)
class RolloutConfig:
    """How drafts and refinements are sampled."""

    # Longest draft or refinement, in tokens, EOS included.
    max_completion_length: Annotated[int, AtLeast(1)] = 4096
    # Temperature of drafts and refinements; the trainer's log-probs are taken at it too.
    temperature: Annotated[float, AtLeast(0)] = 0.7
    # Probability mass of the nucleus that tokens are drawn from. Below 1 the sampler draws from another distribution
    # than the trainer, which sees all tokens.
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    # Number of most likely tokens that a token is drawn from; 0 for all. Above 0 the sampler draws from another
    # distribution than the trainer, which sees all tokens.
    top_k: Annotated[int, AtLeast(0)] = 0
    # Number of completions that are decoded at once.
    slots: Annotated[int, AtLeast(1)] = 64
    # Number of pages of the cache on each shard of the batch; 0 for as many as all slots can need, or as the memory of
    # the device leaves. Where they run out, the completions that began last are drawn again later, with the same
    # tokens.
    pages: Annotated[int, AtLeast(0)] = 0
    # Number of tokens that a page of the cache holds; 0 for 16 on CPU and 64 elsewhere.
    page_size: Annotated[int, AtLeast(0)] = 0
    # Number of tokens that each slot decodes before the host looks at the slots.
    steps_per_dispatch: Annotated[int, AtLeast(1)] = 16
    # With 1 the device decodes on while the host looks, with 0 it waits; None for 0 on CPU and 1 elsewhere.
    dispatches_ahead: Annotated[int | None, Choice(None, 0, 1)] = None
    # Whether a prompt is refined as soon as its kept draft is certain; False waits for all drafts of all prompts, for
    # comparisons.
    streamed: bool = True
    mesh: SamplerMeshConfig = field(default_factory=SamplerMeshConfig)


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that scores answers in [0, 1]."""

    # Weight of the judge's score in the reward; 0 for no judge.
    weight: Annotated[float, AtLeast(0)] = 0.0
    # Name of the judge's model at its endpoint.
    model: str = ""
    # Address of the judge's endpoint, such as http://localhost:8000/v1; empty for the openai client's own
    # (OPENAI_BASE_URL or OpenAI).
    base_url: str = ""
    # Environment variable that holds the key of the judge's endpoint; the key itself is never stored.
    api_key_env: Annotated[
        str,
        Matches(
            r"[A-Z_][A-Z0-9_]*",
            "the name of an environment variable in capitals, such as OPENAI_API_KEY, and not the key itself; export "
            "the key in it",
            secret=True,  # what is not a name is likely the key
        ),
    ] = "OPENAI_API_KEY"
    # What the judge is asked to look at; the form of the reply that it must give is added.
    instruction: str = (
        "Grade the answer to a mathematics problem. 1 means that the final answer is right and the reasoning is sound, "
        "0 that the answer is wrong or missing; give partial credit in between for reasoning that comes near."
    )
    # Whether the judge sees the reference answer.
    show_reference: bool = True
    # Temperature of the judge; None sends none, for models that refuse any but their own.
    temperature: Annotated[float | None, AtLeast(0)] = 0.0
    # Longest reply of the judge in tokens, its reasoning included.
    max_tokens: Annotated[int, AtLeast(1)] = 1024
    # Longest time that one request to the judge may take, in seconds.
    timeout: Seconds = 60.0
    # Number of additional attempts of a request to the judge, with back-off, after a time-out, a rate limit or a broken
    # connection.
    max_retries: Annotated[int, AtLeast(0)] = 4
    # Number of requests to the judge that are in flight at once.
    concurrency: Annotated[int, AtLeast(1)] = 16
    # Largest number of requests to the judge in a step, retries included; completions beyond it have no verdict. A run
    # is refused where more than rewards.max_error_fraction of a step's completions could be without one. Several teams
    # of processes share it by their prompts, each share rounded up. 0 for no limit.
    budget: Annotated[int, AtLeast(0)] = 0
    # File of the judge's verdicts, shared by the runs of a machine that name it, or by way of a bucket; empty for
    # WORKDIR/judge.sqlite. Of several processes, each but the first has its own file next to it, NAME.process-N.
    cache: str = ""


@dataclass(frozen=True)
class RewardsConfig:
    """What a completion earns: a weighted sum of rewards, computed by separate processes."""

    # Weight of the accuracy reward.
    accuracy: Annotated[float, AtLeast(0)] = 1.0
    # Weight of the reward for the form <think>…</think><answer>…</answer>.
    format: Annotated[float, AtLeast(0)] = 1.0
    # Weight of the soft over-long penalty, which falls from 0 to -1 at rollout.max_completion_length.
    overlong: Annotated[float, AtLeast(0)] = 0.0
    # Number of last tokens before rollout.max_completion_length over which the over-long penalty grows; DAPO's L_cache.
    overlong_cache: Annotated[int, AtLeast(0)] = 0
    # A reward of your own, written as "module:function"; empty for none. It gets all drafts or all refinements of a
    # prompt at once.
    custom: Annotated[str, Matches(r"([\w.]+:\w+)?", "written as module:function", otherwise=IN_A_FILE)] = ""
    # Weight of rewards.custom. At 0 it is computed and logged, does not count in the reward, and may
    # still be named by settings such as algorithm.draft_metric.
    custom_weight: float = 1.0
    # Several rewards of your own, instead of rewards.custom; each has the name of its function.
    functions: Annotated[
        tuple[str, ...], Each(Matches(r"[\w.]+:\w+", "written as module:function", otherwise=IN_A_FILE), once=True)
    ] = ()
    # Weight of each of rewards.functions, in the same order; empty for 1 each.
    function_weights: tuple[float, ...] = ()
    # Whether rewards of your own receive each prompt and completion as a list of chat messages (role, content), as TRL
    # gives those of conversational data sets; False for texts.
    conversational: bool = False
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    # Number of verifier processes.
    workers: Annotated[int, AtLeast(1)] = 2
    # Time that one grading may take before its worker is killed, in seconds. One call of the custom reward may take
    # this time for each of its completions.
    timeout: Seconds = 5.0
    # Address space that each verifier process may use, in GiB; a grading that needs more fails. A reward of your own
    # that imports PyTorch or loads a model may need more.
    memory_gib: Annotated[float, Between(1, 2**20)] = 4.0
    # Fraction of a step's gradings that may fail, time out or have no verdict before the run stops. A completion has no
    # verdict if the judge gave none, or if every reward function whose weight is not 0 returned None.
    max_error_fraction: Annotated[float, Between(0, 1)] = 0.5

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rewards in use."""
        used = {name: getattr(self, name) for name in ("accuracy", "format", "overlong")}
        used |= dict.fromkeys(self.custom_names, 1.0) | {"judge": self.judge.weight}
        return tuple(name for name, weight in used.items() if weight)

    @property
    def answer_readers(self) -> tuple[str, ...]:
        """The settings by which a reward of the library reads reference answers, as values that would end that."""
        judged = self.judge.weight and self.judge.show_reference
        return ("accuracy = 0",) * bool(self.accuracy) + ("judge.show_reference = False",) * bool(judged)

    @property
    def custom_weights(self) -> dict[str, float]:
        """The weights of the custom rewards by "module:function"; one of weight 0 is computed and logged."""
        if self.functions:
            return dict(zip(self.functions, self.function_weights or (1.0,) * len(self.functions), strict=False))
        return {self.custom: self.custom_weight} if self.custom else {}

    @property
    def custom_names(self) -> tuple[str, ...]:
        """The names of the custom rewards."""
        return tuple(path.rpartition(":")[2] for path in self.custom_weights)

    @property
    def largest(self) -> float:
        """The most that a completion can earn without custom rewards, whose values have no bound.

        It is rounded as the verifier rounds the reward of a completion that earns all of it.
        """
        return float(sum((self.accuracy, self.format, self.judge.weight)))


@dataclass(frozen=True)
class LearnerConfig:
    """How an update is computed, and what it may cost in memory."""

    # Number of tokens of one forward and backward pass on each shard of the batch.
    tokens_per_microbatch: Annotated[int, AtLeast(1)] = 16384
    # Sizes of micro-batches, as fractions of tokens_per_microbatch: full ones, and smaller ones for what is left of a
    # step. A program is compiled for each. One is 1.0, because the others may be too small for the longest context.
    microbatch_sizes: Annotated[tuple[float, ...], Each(Between(0.01, 1))] = (1.0, 0.5, 0.125)
    # Whether a prompt, with its draft, is run once for all its completions; False is for comparisons.
    shared_prefix: bool = True
    # Number of optimizer steps per pass over a rollout. With more than one, which completions share a step depends on
    # the number of devices, because completions of a group that are updated together stay together. SFT has no rollout
    # and always makes one optimizer step of `prompts_per_step` examples.
    minibatches: Annotated[int, AtLeast(1)] = 1
    # Number of steps in a row with a loss or gradient that is not finite before the run stops; each changes nothing
    # and leaves its batch in WORKDIR/nonfinite.
    max_nonfinite_steps: Annotated[int, AtLeast(1)] = 5
    # What the backward pass recomputes: logits and of each sublayer all ("full"), or all but matrix products ("dots"),
    # or only logits ("logits"), or nothing ("none"); "auto" is the least of them that fits into memory by the
    # compiler's count, but at least logits on a CPU.
    remat: Annotated[str, Choice("auto", "full", "dots", "logits", "none")] = "auto"
    # Kernel of attention: "cudnn" is for GPUs and "splash" for TPUs; "auto" chooses by device and dtype.
    attention: Annotated[str, Choice("auto", "xla", "chunked", "cudnn", "splash")] = "auto"
    # Whether the reference model (beta > 0) stays in host memory between its forward passes.
    offload_reference: bool = False
    # Number of completion positions on each shard of the batch whose logits are computed at once; None for up to 1,024,
    # on a CPU 256, as many as 1/128 of the device's memory holds.
    logprob_chunk: Annotated[int | None, AtLeast(1)] = None


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with linear warm-up and cosine decay."""

    # Optimizer: "muon" keeps one moment for each matrix of a sublayer and orthogonalizes it, "adafactor"
    # keeps hardly any state.
    name: Annotated[str, Choice("adamw", "muon", "adafactor")] = "adamw"
    # Peak learning rate. Muon's steps are scaled to the size of AdamW's.
    learning_rate: Annotated[float, AtLeast(0), Below(1000)] = 1e-6
    # Decay of AdamW's first moment and of Muon's momentum; Adafactor has neither.
    b1: Annotated[float, AtLeast(0), Below(1)] = 0.9
    # Decay of AdamW's second moment, which Muon has for what is not a matrix; Adafactor's follows from the step.
    b2: Annotated[float, AtLeast(0), Below(1)] = 0.999
    # Decoupled weight decay; biases and norms have none.
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    # Largest norm of the gradient of all parameters together; a larger gradient is scaled down to it.
    max_grad_norm: Annotated[float, Above(0, "above 0 (a large number switches clipping off)")] = 1.0
    # Dtype of AdamW's first moment and of Muon's momentum. Second moments stay float32, because their steps of
    # 1 - b2 = 0.001 are below what bfloat16 resolves.
    mu_dtype: Annotated[str, Choice("float32", "bfloat16")] = "float32"
    # Fraction of all optimizer steps over which the learning rate rises to its peak.
    warmup_ratio: Annotated[float, Between(0, 1)] = 0.1
    # Where the cosine decay of the learning rate ends, as a fraction of the peak.
    min_lr_ratio: Annotated[float, Between(0, 1)] = 0.1


@dataclass(frozen=True)
class MeshConfig:
    """The axes of the device mesh. At most one may be -1, which stands for the rest of the devices."""

    # Number of replicas of the weights.
    data: AxisSize = 1
    # Number of parts that the weights and the batch are sharded into.
    fsdp: AxisSize = -1
    # Number of parts that heads, MLP and vocabulary are sharded into.
    tensor: AxisSize = 1


@dataclass(frozen=True)
class ClusterConfig:
    """Several processes that run together."""

    # Time within which all processes must have joined, in seconds.
    start_timeout: Seconds = 300.0
    # Time without a sign of life after which a process counts as lost and the others end, in seconds.
    silence: Seconds = 30.0


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, what is kept of it, and what happens at SIGTERM."""

    # Number of steps between checkpoints; 0 saves the last step only, which is always saved.
    every: Annotated[int, AtLeast(0)] = 50
    # Number of newest checkpoints that are kept.
    keep: Annotated[int, AtLeast(1)] = 3
    # A metric such as eval/math500/pass@1: the checkpoint where it was highest is kept too; empty for none.
    best_metric: str = ""
    # Whether the policy of the last step is also written to WORKDIR/export, as a Hugging Face directory.
    export: bool = False
    # Repository of the Hugging Face hub, owner/name, that the export of the last step is put into, with a model card;
    # empty for none. It is made private. The token is HF_TOKEN, or that of `hf auth login`.
    push: Annotated[str, Matches(r"([\w.-]+/[\w.-]+)?", "owner/name of a repository, or empty")] = ""
    # Time after SIGTERM within which the run has ended, whether it could save or not, in seconds.
    preemption_grace: Seconds = 25.0


@dataclass(frozen=True)
class WatchdogConfig:
    """How long a run may wait without progress before the log names what it waits for, with all threads' stacks."""

    # Seconds of waiting for the verifier's next score before the log names it; 0 for never.
    verifier: Annotated[float, AtLeast(0)] = 300.0
    # Seconds of waiting for one call of the sampler or one update, with what they compile, before the log names it; 0
    # for never.
    dispatch: Annotated[float, AtLeast(0)] = 1800.0
    # Seconds of waiting for a checkpoint to be written or read before the log names it; 0 for never.
    checkpoint: Annotated[float, AtLeast(0)] = 1800.0


@dataclass(frozen=True)
class EvaluationConfig:
    """Benchmarks, asked with the plain prompt (the single shot) and, where wanted, with rounds of draft and refine."""

    # Number of steps between single-shot evaluations, which also run before the first and after the last step; 0 for
    # never.
    every: Annotated[int, AtLeast(0)] = 0
    # Names of benchmarks: aime24, aime25, aime26, hmmt_feb25, hmmt_nov25, brumo25, math500, amc23, gsm8k, minerva,
    # olympiadbench, gpqa_diamond, mmlu_pro, the built-in "arithmetic" and "lookups", or the name of a file in data_dir.
    benchmarks: tuple[str, ...] = ()
    # Number of completions per problem; None for 64 on AIME and other contests of 30 problems, 8 on the others that are
    # known by name, and 1 on mmlu_pro and on files of your own. The paper's are 64 and 8.
    samples: Annotated[int | None, AtLeast(1)] = None
    # Number of draft -> refine rounds that are evaluated in addition to the single shot.
    rounds: Annotated[int, AtLeast(0)] = 0
    # Number of samples among which a round chooses its draft: the first ones of the round before, or of the single
    # shot.
    drafts: Annotated[int, AtLeast(1)] = 4
    # Number of problems asked of each benchmark, from its start; 0 for all.
    limit: Annotated[int, AtLeast(0)] = 0
    # Temperature of evaluation's completions; that of training is rollout.temperature.
    temperature: Annotated[float, AtLeast(0)] = 0.6
    # Probability mass of the nucleus that evaluation's tokens are drawn from.
    top_p: Annotated[float, Above(0), AtMost(1)] = 0.95
    # Values of k in pass@k and maj@k; empty for 1, 2, 4, 8, ... up to the number of samples.
    pass_at: Annotated[tuple[int, ...], Each(AtLeast(1))] = ()
    # Longest completion of an evaluation in tokens, cut to the model's context; None for
    # rollout.max_completion_length.
    max_completion_length: Annotated[int | None, AtLeast(1)] = None
    # Folder of NAME.jsonl (or .csv, .json, .parquet) files of benchmarks, which are used before the hub.
    data_dir: str = ""
    # Column of the question in the files of data_dir, in which a dot reaches into nested columns; empty finds it by
    # name, as data.prompt_column does.
    prompt_column: str = ""
    # Column of the answer in the files of data_dir, in which a dot reaches into nested columns; empty finds it by name,
    # as data.answer_column does.
    answer_column: str = ""


@dataclass(frozen=True)
class LogConfig:
    """What is seen of a run in progress."""

    # Number of steps between lines on the console.
    every: Annotated[int, AtLeast(1)] = 1
    # Number of steps between samples of a draft and its refinement on the console; 0 for none.
    samples_every: Annotated[int, AtLeast(0)] = 10
    # Where the rows of metrics.jsonl are sent too; a tracker of your own is written as module:Class.
    trackers: Annotated[
        tuple[str, ...],
        Each(
            Matches(
                r"tensorboard|wandb|trackio|mlflow|[\w.]+:\w+", "tensorboard, wandb, trackio, mlflow or module:Class"
            ),
            once=True,
        ),
    ] = ("tensorboard",)
    # Steps that the JAX profiler records into WORKDIR/profile.
    profile_steps: Annotated[tuple[int, ...], Each(AtLeast(1))] = ()


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    # What other libraries call a field, or what is not a field but a flag; an error then names it.
    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "lr": ("optimizer.learning_rate", "warm_start.learning_rate"),
        "learning_rate": ("optimizer.learning_rate", "warm_start.learning_rate"),
        "batch_size": ("prompts_per_step", "warm_start.batch_size"),
        "max_tokens": ("rollout.max_completion_length", "evaluation.max_completion_length"),
        "max_new_tokens": ("rollout.max_completion_length", "evaluation.max_completion_length"),
        "num_epochs": ("epochs",),
        "num_train_epochs": ("epochs",),
        "max_steps": ("steps",),
        "output_dir": ("--workdir",),
    }

    # Seed of the order of problems and of all that is sampled.
    seed: Annotated[int, AtLeast(0), Below(2**31, "below 2**31")] = 0
    # Number of rollouts; 0 for as many as `epochs` needs.
    steps: Annotated[int, AtLeast(0, "0 (use epochs) or a number of rollouts")] = 0
    # Number of passes over the training set, where steps = 0.
    epochs: float = 1.0
    # Number of problems in a rollout, each with its drafts and refinements.
    prompts_per_step: Annotated[int, AtLeast(1)] = 32
    # Folder of compiled programs, shared by all runs, also in a bucket; empty for none.
    compilation_cache: str = "~/.cache/igrpo_jax"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    sft: SftConfig = field(default_factory=SftConfig)
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
    def filter_groups_metric(self) -> str:
        """The metric in which the completions of a group must differ where algorithm.max_redraws > 0."""
        return self.algorithm.filter_groups_metric or ("accuracy" if self.rewards.accuracy else "reward")

    @property
    def trained_completions(self) -> int:
        """Number of completions that a step trains on, where no draft is dropped."""
        drafts = self.algorithm.num_drafts if self.algorithm.train_drafts else 0
        return self.prompts_per_step * (self.algorithm.num_generations + drafts)

    @property
    def optimizer_steps_per_update(self) -> int:
        """Number of minibatches of an update over all its iterations."""
        return self.learner.minibatches * self.algorithm.num_iterations

    @property
    def draft_limit(self) -> int:
        """Number of tokens of a draft that q' keeps."""
        return self.refine.max_draft_length or self.rollout.max_completion_length


# Fields and sections that may differ between a run and its resume: how long it runs and what is seen of it, not what
# it does.
MAY_CHANGE_ON_RESUME = (
    *("steps", "compilation_cache", "cluster", "log", "evaluation", "checkpoint", "watchdog"),
    # A run that ended for want of memory, of time or of a judge has to change these to go on. Results stay the same,
    # except for how sums are rounded and for gradings that had no verdict.
    *(
        "rollout.slots",
        "rollout.pages",
        "rollout.page_size",
        "rollout.mesh",
        "learner.tokens_per_microbatch",
        "learner.microbatch_sizes",
        "learner.logprob_chunk",
    ),
    *("learner.remat", "learner.attention", "learner.offload_reference"),
    *("rewards.workers", "rewards.timeout", "rewards.memory_gib", "rewards.max_error_fraction"),
    *(
        f"rewards.judge.{name}"
        for name in ("base_url", "api_key_env", "timeout", "max_retries", "concurrency", "budget")
    ),
)


def default() -> ml_collections.ConfigDict:
    """Returns a ConfigDict with every field at its default, for a file in configs/ to edit."""
    return trees.to_config_dict(Config())


def freeze(tree: ml_collections.ConfigDict) -> Config:
    """Checks `tree` and returns it as frozen dataclasses.

    Raises:
        InputError: a field is unknown, has the wrong type, or a value that no run can use.
    """
    config = trees.from_config_dict(Config, tree)
    constraints.check(config)
    return config


def check_field(path: str) -> None:
    """Checks that `path` (dotted) is a field.

    Raises:
        InputError: there is no such field; the message gives the nearest name.
    """
    fields.check_path(Config, path)


def to_dict(config: Config) -> dict[str, Any]:
    """Returns a plain nested dict, as written to DIR/config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def with_defaults(settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what an older version wrote to DIR/config.json, with the defaults of the fields that came later."""
    defaults = to_dict(Config()) if defaults is None else defaults
    complete = defaults | settings
    for name, default in defaults.items():
        if isinstance(default, dict) and name in settings:
            complete[name] = with_defaults(settings[name], default)
    return complete


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Compares two results of `to_dict`, and returns `name: old -> new` for each change that a resume must not have."""
    rows = []
    for name in sorted(old.keys() | new.keys()):
        if prefix + name in MAY_CHANGE_ON_RESUME:
            continue
        before = old.get(name)
        after = new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            rows += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            rows.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return rows
