"""What a run needs of its devices, found by compiling its programs (`building`): memory, work, and communication.

Of each kind of program, the shape that needs most memory is compiled, by the same code that trains, without weights or
a tokenizer; the devices need not be there (`jax.experimental.topologies`).

1. Memory is what the compiler counts for a program, plus what else is on the device while it runs: training state,
   rollout weights, cache, the machine code of all programs.
2. FLOPs and bytes are counted by formula (`models.costs`), collectives in the compiled text (`collectives`). With the
   published peaks of the chip they give the least time of a call, and of a step in which every completion is as long
   as allowed, with the time that chips wait for the reductions of each token (`ModelCosts.decode_seconds`).

Lengths are the most that the configuration allows: data.max_prompt_length tokens of a question, and one token for each
word or mark of the wording around it. A run knows its prompts and may need less.
"""

import math
from dataclasses import dataclass, field, replace

import jax

from igrpo_jax.aot.collectives import OVER_DCN, Traffic
from igrpo_jax.aot.slices import alone
from igrpo_jax.config import Config, ModelConfig
from igrpo_jax.data.prompts import most_overhead
from igrpo_jax.distributed import chips, sharding
from igrpo_jax.distributed.chips import Chip
from igrpo_jax.distributed.programs import Cost, Program, is_refused
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import planning
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.models import hf_files
from igrpo_jax.models.config import DecoderConfig, from_hf
from igrpo_jax.models.policy import fit_to_mesh, open_policy
from igrpo_jax.models.shapes import SHAPES
from igrpo_jax.sampling import page_count
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.pages import pages_for
from igrpo_jax.sampling.programs import SamplerPrograms
from igrpo_jax.sampling.row_sync import SyncProgram
from igrpo_jax.session.run_inputs import check_positions, open_run_programs
from igrpo_jax.storage import addresses


@dataclass
class ProgramFootprint:
    """One compiled program. Bytes are those on each device."""

    program: Program
    name: str
    cost: Cost  # the work of one call
    beside: int  # bytes of what else is on the device while it runs
    seconds: float = 0.0  # time that it took to compile
    arguments: int = 0
    temporaries: int = 0
    output: int = 0  # without outputs that reuse the memory of an argument
    code: int = 0
    sent: dict[str, Traffic] = field(default_factory=dict)
    refused: str = ""  # the compiler's message where the program needs more memory than there is

    @property
    def kind(self) -> str:
        """The name that it shares with programs of other shapes."""
        return self.program.name

    @property
    def total(self) -> int:
        """Bytes on the device while it runs."""
        return self.beside + self.arguments + self.temporaries + self.output

    @property
    def received(self) -> float:
        """Bytes that a device receives from others of its slice in one call."""
        return sum(traffic.bytes for kind, traffic in self.sent.items() if not kind.endswith(OVER_DCN))

    @property
    def over_dcn(self) -> float:
        """Bytes that a device receives from other slices in one call."""
        return sum(traffic.bytes for kind, traffic in self.sent.items() if kind.endswith(OVER_DCN))


@dataclass
class Footprint:
    """What a run of `config` needs of the devices of `mesh`."""

    config: Config
    chip: Chip
    mesh: jax.sharding.Mesh
    cfg: DecoderConfig
    learner: LearnerPrograms
    engine: Engine
    sampler: SamplerPrograms  # of one team of processes
    syncs: list[SyncProgram]  # what makes the rollout copy of the weights
    longest_prompt: int  # tokens of the longest q or q'
    programs: list[ProgramFootprint] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Bytes of machine code of all programs that a run may load, each as large as the largest of its kind here."""
        sizes: dict[Program, int] = {}
        for part in self.programs:
            sizes[part.program] = max(part.code, sizes.get(part.program, 0))
        return sum(len(program.shapes) * size for program, size in sizes.items())

    @property
    def resident(self) -> dict[str, int]:
        """Bytes that lie on each device while completions are sampled, whatever program runs, by what they are for."""
        return {
            "training state": self.learner.resident_bytes,
            "weights to sample with": self.engine.programs.weight_bytes,
            "cache": self.engine.state_bytes,
        }

    @property
    def fullest(self) -> ProgramFootprint:
        """The program during whose run the most memory is used."""
        return max(self.programs, key=lambda part: (bool(part.refused), part.total))

    @property
    def used_fraction(self) -> float:
        """Fraction of a device's memory that is used while the fullest program runs."""
        return (self.fullest.total + self.code) / self.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        """Whether every program can run."""
        return not self.fullest.refused and self.used_fraction <= 1

    def received(self, program: Program) -> float:
        """Returns the most bytes that a device receives from its slice in one call of `program`."""
        return max((part.received for part in self.programs if part.program is program), default=0.0)

    @property
    def weights_received(self) -> float:
        """Bytes that a device receives from its slice for the rollout copy of the weights."""
        return sum(self.received(sync.program) * sync.calls for sync in self.syncs)

    @property
    def slices(self) -> int:
        """Number of slices that the devices belong to."""
        return len(set(sharding.slice_of(self.mesh.devices).flat))

    @property
    def over_dcn(self) -> float:
        """Bytes that a device receives from other slices in a step in which every completion is as long as allowed."""
        calls = {sync.program: sync.calls for sync in self.syncs}
        calls |= self._update_calls(self.longest_prompt, self.config.rollout.max_completion_length)
        most = lambda program: max((part.over_dcn for part in self.programs if part.program is program), default=0.0)
        # Groups of the sampler lie within a slice, and exchange nothing with others.
        return sum(most(program) * times for program, times in calls.items())

    def least(self, cost: Cost, received: float = 0.0) -> tuple[float, str]:
        """Returns the least seconds that the work can take, and what bounds it: "compute", "memory" or "links"."""
        chip = self.chip
        parts = {"compute": cost.flops / chip.flops, "memory": cost.bytes / chip.bandwidth}
        parts["links"] = received / chip.links
        bound = max(parts, key=parts.__getitem__)
        return parts[bound], bound

    def step(self, part: float = 1.0) -> dict[str, tuple[float, str]]:
        """Returns `least` of each part of a step.

        Args:
            part: the mean length of completions, and of the drafts in prompts, over what is allowed. At 1 every
                completion is as long as allowed; below it a slot takes the next completion as soon as one ends.
        """
        algorithm, prompt = self.config.algorithm, self.config.data.max_prompt_length
        length = math.ceil(self.config.rollout.max_completion_length * part)
        context = prompt + math.ceil((self.longest_prompt - prompt) * part)
        synced = [self._calls(sync.program, sync.program.shapes[0], sync.calls) for sync in self.syncs]
        parts = {"weights": (sum(seconds for seconds, _ in synced), max(synced)[1])}
        parts |= self._sampling("drafts", prompt, algorithm.num_drafts, length)
        parts |= self._sampling("refinements", context, algorithm.num_generations, length)
        return parts | self._updating(context, length)

    def _calls(self, program: Program, shape: tuple, calls: int) -> tuple[float, str]:
        """Returns `least` of the given number of `calls` of a program."""
        return self.least(program.cost(*shape) * calls, self.received(program) * calls)

    def _sampling(self, stage: str, context: int, samples: int, length: int) -> dict[str, tuple[float, str]]:
        """Returns `least` of prefilling and decoding `samples` completions of `length` tokens of each prompt."""
        engine, prompts, shards = self.engine, self.config.prompts_per_step, self.engine.groups
        programs = self.sampler
        completions = -(-prompts * samples // shards)  # of a shard
        if not completions:
            return {}
        # The samples of a prompt share its full pages. Each holds its other pages until its last token.
        held = pages_for(context / samples + length, engine.sizes.page_size) + 1
        parts = engine.sizes.parts
        rows = min(completions, parts * engine.shard_slots, parts * max(1, engine.sizes.pages // held))
        is_longest = length == self.config.rollout.max_completion_length
        steps = (-(-completions // rows) if is_longest else completions / rows) * length
        costs, prefill = programs.costs, programs.prefill
        read = context + length / 2
        # `collectives` counts the decode loop once, because its length is not known: `received` is that of one token.
        token, bound = self.least(costs.decode(rows, read), self.received(programs.decode))
        token = max(
            token, costs.decode_seconds(self.chip, rows, read)
        )  # with the time that devices wait for reductions
        own = -(-prompts // shards)
        chunks = -(-own * context // programs.chunks[-1])
        return {
            f"prefill of {stage}": self.least(costs.prefill(context) * own, self.received(prefill) * chunks),
            f"decoding of {stage}": (token * steps, bound),
        }

    def _updating(self, context: int, length: int) -> dict[str, tuple[float, str]]:
        """Returns `least` of the gradients, of the rescoring before them, and of the optimizer steps."""
        programs, shape = self.learner, (self.learner.packer.shapes.largest,)
        calls = self._update_calls(context, length)
        parts = {"gradients": self._calls(programs.accumulate, shape, calls[programs.accumulate])}
        if calls[programs.rescore]:
            parts["log-probs"] = self._calls(programs.rescore, shape, calls[programs.rescore])
        return parts | {"optimizer": self._calls(programs.apply, (), calls[programs.apply])}

    def _update_calls(self, context: int, length: int) -> dict[Program, int]:
        """Returns how often an update calls each of its programs."""
        programs, algorithm = self.learner, self.config.algorithm
        shapes, optimizer_steps = programs.packer.shapes, self.config.optimizer_steps_per_update
        completions = shapes.completions_per_unit
        tokens = self.config.trained_completions // completions * (context - 1 + completions * length)
        batches = -(-tokens // (shapes.largest * shapes.shards))
        return {
            programs.accumulate: algorithm.num_iterations * batches,
            programs.rescore: batches * ((optimizer_steps > 1) + (algorithm.beta > 0)),
            programs.apply: optimizer_steps,
        }


def describe(config: ModelConfig) -> DecoderConfig:
    """Returns the model of config.model, from nothing but its config.json.

    Raises:
        InputError: it is neither a directory nor one of the public models whose shape is known.
    """
    path = config.path
    if not path:
        return open_policy(config).cfg
    source = f"config.model.path = {path!r}"
    if addresses.is_remote(path) or addresses.path_of(source, path).is_dir():
        return hf_files.load_config(path)
    if path not in SHAPES:
        raise InputError(
            f"{source}: no such directory, and not among the models whose shape is known without a "
            f"download ({', '.join(SHAPES)}); give a directory that holds its config.json"
        )
    return from_hf(SHAPES[path], path)


def prepare(config: Config, devices: list) -> Footprint:
    """Returns the footprint of a run on `devices`, with as many pages as are estimated to fit (see `fitted`), and
    without programs: `building.build` fills them in.

    Raises:
        InputError: a kind of device whose figures are not known, or settings that a run would refuse too.
    """
    cfg = describe(config.model)
    max_positions = cfg.max_position_embeddings
    drafted = most_overhead(config.refine, min(config.draft_limit, config.rollout.max_completion_length))
    longest_prompt = config.data.max_prompt_length + (drafted if config.algorithm.num_drafts else 0)
    check_positions(config, max_positions, longest_prompt)
    max_new_tokens = config.evaluation.max_completion_length or config.rollout.max_completion_length
    evaluation_plan = planning.Plan({}, max_positions, 0, 0, max_new_tokens)
    if config.evaluation.every:
        drafted = most_overhead(config.refine, min(config.draft_limit, max_new_tokens))
        longest = config.data.max_prompt_length + (drafted if config.evaluation.rounds else 0)
        evaluation_plan = replace(
            evaluation_plan, longest_prompt=longest, max_completion=min(max_new_tokens, max_positions - 1)
        )
    mesh = sharding.make_mesh(config.mesh, devices)
    cfg = fit_to_mesh(config, cfg, mesh)
    chip = chips.of(devices[0].device_kind)
    learner = LearnerPrograms(config, cfg, mesh, longest_prompt=longest_prompt, total_steps=config.steps or 1)
    memory = int(chip.hbm_bytes) - learner.resident_bytes
    programs = open_run_programs(config, cfg, mesh, (cfg.vocab_size - 1,), longest_prompt, evaluation_plan, memory)
    engine = Engine(cfg, mesh, programs)
    syncs = engine.sync.programs(learner.abstract_rollout_params)
    return Footprint(config, chip, mesh, cfg, learner, engine, _of_team(programs, mesh), syncs, longest_prompt)


def fitted(footprint: Footprint) -> Footprint:
    """Returns `footprint` with as many pages as a run would have (`page_count.fitted`); if even the fewest are refused,
    it is returned as it is, and the table will say so."""
    try:
        sampler = page_count.fitted(footprint.sampler)
    except jax.errors.JaxRuntimeError as error:
        if not is_refused(error):
            raise
        return footprint
    is_alone = footprint.sampler is not footprint.engine.programs
    programs = footprint.engine.programs.resized(sampler.sizes) if is_alone else sampler
    return replace(footprint, engine=Engine(footprint.cfg, footprint.mesh, programs), sampler=sampler)


def _of_team(programs: SamplerPrograms, mesh: jax.sharding.Mesh) -> SamplerPrograms:
    """Returns the sampler's programs, compiled for the chips of one team as if no others were there."""
    if programs.mesh.size == mesh.size:
        return programs
    return SamplerPrograms(programs.cfg, alone(programs.mesh), programs.eos_ids, programs.dtype, programs.sizes)
