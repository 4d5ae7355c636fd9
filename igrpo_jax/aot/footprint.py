"""What a run needs of its devices, found by building its programs for them: memory, work, and what they send.

Of each kind of program the one that needs most memory is built, by the very code that trains, without weights or a
tokenizer; the devices need not be there (`jax.experimental.topologies`).

1. Memory is what the compiler says of a program, and what else is on the device while it runs: training state, rollout
   weights, cache, the machine code of all programs.
2. FLOPs and bytes are counted by formula (`costs`), collectives in the compiled text (`collectives`). With the chip's
   published peaks they give the least time of a call, and of a step in which every completion is as long as allowed.

Lengths are the most that the configuration allows: data.max_prompt_length tokens of a question, and of the wording one
token for each word or mark. A run knows its prompts and may need less.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import jax

from igrpo_jax.aot.collectives import Traffic, collectives
from igrpo_jax.config import Config, ModelConfig
from igrpo_jax.data.prompts import most_overhead
from igrpo_jax.distributed import chips, sharding
from igrpo_jax.distributed.chips import Chip
from igrpo_jax.distributed.programs import Key
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import planning
from igrpo_jax.learning.learner import Learner
from igrpo_jax.models import hf_files
from igrpo_jax.models.config import DecoderConfig, from_hf
from igrpo_jax.models.costs import Cost, Costs
from igrpo_jax.models.policy import open_policy
from igrpo_jax.models.shapes import SHAPES
from igrpo_jax.sampling.engine import WIDTH, Engine
from igrpo_jax.session import overview
from igrpo_jax.session.task import check_context, fitted, sampler

THREADS = 2  # programs compiled at once; each takes gigabytes of the host's memory


@dataclass
class Program:
    """One program, compiled. Bytes are those on each device."""

    kind: str
    name: str
    cost: Cost
    beside: int  # of what is on the device and no argument of it
    seconds: float = 0.0  # to compile
    arguments: int = 0
    temporaries: int = 0
    output: int = 0  # without what takes the place of an argument
    code: int = 0
    sent: dict[str, Traffic] = field(default_factory=dict)
    refused: str = ""  # what the compiler said where the program needs more than there is

    @property
    def total(self) -> int:
        return self.beside + self.arguments + self.temporaries + self.output

    @property
    def received(self) -> float:
        """Bytes that a device receives of others."""
        return sum(traffic.bytes for traffic in self.sent.values())


@dataclass
class Footprint:
    """Of a run `config` on `mesh`."""

    config: Config
    chip: Chip
    mesh: jax.sharding.Mesh
    model: DecoderConfig
    learner: Learner
    engine: Engine
    costs: Costs
    max_context: int  # tokens of the longest q or q'
    programs: list[Program] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Bytes of machine code of all programs that a run may load, each as large as the largest of its kind here."""
        shapes = len(self.learner.packer.shapes)
        counts = self.engine.counts | {"accumulate": shapes, "score": shapes}
        sizes: dict[str, int] = {}
        for program in self.programs:
            sizes[program.kind] = max(program.code, sizes.get(program.kind, 0))
        return sum(counts.get(kind, 1) * size for kind, size in sizes.items())

    @property
    def fullest(self) -> Program:
        """The program while which most memory is taken."""
        return max(self.programs, key=lambda program: (bool(program.refused), program.total))

    @property
    def share(self) -> float:
        """Of the memory of a device, at the fullest moment."""
        return (self.fullest.total + self.code) / self.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        return not self.fullest.refused and self.share <= 1

    def least(self, cost: Cost, received: float = 0.0) -> tuple[float, str]:
        """The least seconds for that much work, and what takes them: "compute", "memory" or "links"."""
        chip = self.chip
        parts = {"compute": cost.flops / chip.flops, "memory": cost.bytes / chip.bandwidth}
        parts["links"] = received / chip.links
        bound = max(parts, key=parts.__getitem__)
        return parts[bound], bound

    def step(self) -> dict[str, tuple[float, str]]:
        """`least` of each part of a step in which every completion is as long as allowed."""
        config, engine, costs, a = self.config, self.engine, self.costs, self.config.algorithm
        shards, learner = sharding.batch_shards(self.mesh), self.learner
        longest, received = config.rollout.max_completion_length, {}
        for one in self.programs:
            received[one.kind] = max(one.received, received.get(one.kind, 0.0))
        parts = {"weights": self.least(costs("weights"), received["weights"])}
        stages = {"drafts": (config.data.max_prompt_length, a.num_drafts)}
        stages["refinements"] = (self.max_context, a.num_generations)
        for name, (context, samples) in stages.items():
            each = -(-config.prompts_per_step * samples // shards)  # completions of a shard
            if not each:
                continue
            calls = -(-config.prompts_per_step // shards)
            parts[f"prefill of {name}"] = self.least(costs("prefill", context) * calls, received["prefill"] * calls)
            # The text shows a loop whose trips are not known once: what is received is of one token.
            steps, rows = -(-each // engine.shard_slots) * longest, min(each, engine.shard_slots)
            work = costs("decode", rows, context + longest / 2) * steps
            parts[f"decoding of {name}"] = self.least(work, received["decode"] * steps)
        shape, updates = learner.packer.largest, learner.updates_per_step
        batches = -(-config.trained_completions // learner.packer.share // shape[0])
        passes = config.algorithm.num_iterations * batches
        parts["gradients"] = self.least(costs("accumulate", shape) * passes, received["accumulate"] * passes)
        passes = batches * ((updates > 1) + (a.beta > 0))
        if passes:
            parts["log-probs"] = self.least(costs("score", shape) * passes, received["score"] * passes)
        parts["optimizer"] = self.least(costs("apply") * updates, received["apply"] * updates)
        return parts


def describe(settings: ModelConfig) -> DecoderConfig:
    """The model of config.model, from its config.json alone.

    Raises:
        InputError: it is neither a directory nor one of the public models whose shape is known.
    """
    path = settings.path
    if not path:
        return open_policy(settings).model
    if Path(path).is_dir():
        return hf_files.load_config(path)
    if path not in SHAPES:
        raise InputError(
            f"config.model.path = {path!r}: no such directory, and not among the models whose shape is known without a "
            f"download ({', '.join(SHAPES)}); give a directory that holds its config.json"
        )
    return from_hf(SHAPES[path], path)


def prepare(config: Config, devices: list) -> Footprint:
    """All of a run on `devices` but its programs.

    Raises:
        InputError: devices of unknown figures; what a run would refuse too.
    """
    model = describe(config.model)
    context = model.max_position_embeddings
    drafted = most_overhead(config.refine, min(config.draft_limit, config.rollout.max_completion_length))
    max_context = config.data.max_prompt_length + (drafted if config.algorithm.num_drafts else 0)
    check_context(config, context, max_context)
    wanted = config.evaluation.max_completion_length or config.rollout.max_completion_length
    evaluated = planning.Plan({}, context, 0, 0, wanted)
    if config.evaluation.every:
        drafted = most_overhead(config.refine, min(config.draft_limit, wanted))
        longest = config.data.max_prompt_length + (drafted if config.evaluation.rounds else 0)
        evaluated = replace(evaluated, max_context=longest, max_completion=min(wanted, context - 1))
    mesh = sharding.make_mesh(config.mesh, devices)
    model = fitted(config, model, mesh, max_context, evaluated)
    engine = sampler(config, model, mesh, (model.vocab_size - 1,), max_context, evaluated)
    learner = Learner(config, model, mesh, max_context=max_context, total_steps=config.steps or 1)
    chip = chips.of(devices[0].device_kind)
    return Footprint(config, chip, mesh, model, learner, engine, Costs(config, model, mesh, WIDTH), max_context)


def build(found: Footprint, report: Callable[[Program], None] = lambda program: None) -> None:
    """Fills in the programs of `found`, several compiled at a time; `report` is given each when it is done."""
    learner, engine = found.learner, found.engine
    shapes = dict.fromkeys((learner.packer.largest, learner.packer.fullest))
    trained: list[Key] = [*(("accumulate", shape) for shape in shapes), ("score", learner.packer.fullest), ("apply",)]
    works: list[tuple[Key, Callable[[Key], jax.stages.Lowered]]] = [(key, learner.lower) for key in trained]
    works.append((("weights",), lambda key: engine.lower_weights(learner.abstract_policy())))
    works += [(key, engine.lower) for key in engine.largest]
    with jax.set_mesh(found.mesh), ThreadPoolExecutor(THREADS) as pool:
        pending = []
        for key, lower in works:
            found.programs.append(_program(found, key))
            # Tracing is Python and stays in this thread, which the mesh is set in.
            pending.append(pool.submit(_compile, found.programs[-1], lower(key), found.mesh.size, report))
        for future in pending:
            future.result()
    prefix = next(one.output for one in found.programs if one.kind == "prefill")
    for one in found.programs:
        # A prompt waits on the device until all of its samples have slots.
        one.beside += prefix if one.kind == "decode" else 0


def _program(found: Footprint, key: Key) -> Program:
    kind, *shape = key
    if kind in ("accumulate", "score"):
        units, prefix, share, width = shape[0]
        name = f"{kind} {units} x ({prefix} + {share} x {width})"
    else:
        name = " ".join([kind, " x ".join(map(str, shape))]).strip()
    work = [found.engine.length] if kind in ("move", "empty") else shape
    steps = found.config.rollout.steps_per_dispatch if kind == "decode" else 1
    return Program(kind, name, found.costs(kind, *work) * steps, _beside(found, kind))


def _beside(found: Footprint, kind: str) -> int:
    """Bytes on each device that are no argument of a program of this kind, but wait there while it runs."""
    beside = found.learner.beside
    if kind in beside:
        return beside[kind]
    resting = overview.resting_bytes(found.config, found.mesh, found.learner)
    return {
        "weights": beside["accumulate"],
        "prefill": resting + found.engine.state_bytes,
        "decode": resting,
    }.get(kind, resting + found.engine.weight_bytes)


def _compile(program: Program, lowered: jax.stages.Lowered, devices: int, report: Callable[[Program], None]) -> None:
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        program.refused = str(error).splitlines()[0]
    else:
        memory = compiled.memory_analysis()
        program.arguments, program.temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        program.output = memory.output_size_in_bytes - memory.alias_size_in_bytes
        program.code = memory.generated_code_size_in_bytes
        program.sent = collectives(_text(compiled), devices)
    program.seconds = time.perf_counter() - began
    report(program)


def _text(compiled: jax.stages.Compiled) -> str:
    """The compiled text. Raises InputError where jaxlib cannot read what another libtpu than its own wrote."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"libtpu {metadata.version('libtpu')} writes programs that jaxlib {metadata.version('jaxlib')} cannot read "
            f"({str(error).splitlines()[0][:200]}); install the two that belong together: "
            f'pip install "jax[tpu]=={metadata.version("jax")}"'
        ) from error
