"""Compiles the programs of a footprint for its devices, and fills in what the compiler says of them."""

import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import jax

from igrpo_jax.aot.collectives import collectives
from igrpo_jax.aot.footprint import Footprint, ProgramFootprint
from igrpo_jax.aot.progress import Progress
from igrpo_jax.distributed.programs import Program, is_refused
from igrpo_jax.errors import InputError

THREADS = 2  # programs compiled at once; each takes gigabytes of the host's memory


def build(footprint: Footprint, progress: Progress) -> None:
    """Compiles the programs of `footprint`, several at a time; `progress` names each while and after it is compiled."""
    began = time.perf_counter()
    with progress.doing("choosing learner.remat, for which gradients may be compiled"):
        waiting = _waiting_bytes(footprint)
    choosing = time.perf_counter() - began
    wanted = [(program, beside, shape) for program, beside in waiting.items() for shape in program.largest]
    progress.expect(len(wanted))
    with ThreadPoolExecutor(THREADS) as pool:
        pending = []
        for program, beside, shape in wanted:
            name = program.title(*shape)
            part = ProgramFootprint(program, name, program.cost(*shape), beside)
            footprint.programs.append(part)
            if program.is_ready(*shape):
                _fill_in(part, program.compile(*shape), choosing, progress)
                continue
            # Tracing is Python and stays in this thread, which the mesh is set in.
            with progress.doing(f"tracing {name}"):
                lowered = program.lower(*shape)
            pending.append(pool.submit(_compile, part, lowered, progress))
        for future in pending:
            future.result()


def _waiting_bytes(footprint: Footprint) -> dict[Program, int]:
    """Returns, for each program of a run, the bytes that lie on each device besides its arguments while it runs."""
    learner, sampler = footprint.learner, footprint.sampler
    training = learner.waiting_bytes
    resident, weights = learner.resident_bytes, footprint.engine.programs.weight_bytes
    return {
        learner.accumulate: training.accumulate,
        learner.rescore: training.rescore,
        learner.apply: training.apply,
        # Its arguments and its output are already counted in the training state and in the weights.
        **{sync.program: resident + weights - sync.held for sync in footprint.syncs},
        sampler.empty: resident + weights,
        sampler.harvest: resident + weights,
        sampler.fork: resident + weights,
        sampler.prefill: resident,
        sampler.decode: resident,
    }


def _compile(part: ProgramFootprint, lowered: jax.stages.Lowered, progress: Progress) -> None:
    """Compiles `lowered`, fills in the figures of `part`, and prints how long it took."""
    began = time.perf_counter()
    compiled = None
    with progress.doing(f"compiling {part.name}"):
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_refused(error):
                raise
            part.refused = str(error).splitlines()[0]
    _fill_in(part, compiled, time.perf_counter() - began, progress)


def _fill_in(part: ProgramFootprint, compiled: jax.stages.Compiled | None, seconds: float, progress: Progress) -> None:
    """Fills in the figures of `part`, compiled in `seconds` (`compiled` is None if it was refused); prints a line."""
    if compiled is not None:
        memory = compiled.memory_analysis()
        part.arguments = memory.argument_size_in_bytes
        part.temporaries = memory.temp_size_in_bytes
        part.output = memory.output_size_in_bytes - memory.alias_size_in_bytes
        part.code = memory.generated_code_size_in_bytes
        part.sent = collectives(_text(compiled), part.program.mesh.size)
    part.seconds = seconds
    progress.compiled(f"  {part.name}: compiled in {seconds:.1f} s")


def _text(compiled: jax.stages.Compiled) -> str:
    """Returns the compiled text. Raises InputError if jaxlib cannot read what a libtpu of another version wrote."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"libtpu {metadata.version('libtpu')} writes programs that jaxlib {metadata.version('jaxlib')} cannot read "
            f"({str(error).splitlines()[0][:200]}); install matching versions: "
            f'pip install "jax[tpu]=={metadata.version("jax")}"'
        ) from error
