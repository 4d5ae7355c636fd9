"""`python -m igrpo_jax.report --workdir DIR [--workdir OTHER ...] [--out DIR/report]`: writes a run's curves and
samples as pages that open without a server.

It also works on a run that is under way or has crashed; the same command writes the report again. Several runs are
plotted together. It needs matplotlib (pip install "igrpo-jax[report]"), and neither needs nor touches an accelerator.
"""

import sys

from absl import flags

from igrpo_jax.cli import exits, parsing
from igrpo_jax.errors import InputError
from igrpo_jax.outputs.lines import printable
from igrpo_jax.report import pages


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_multi_string(
        "workdir", None, "folder of a run; give it several times to plot runs together", flag_values=values
    )
    flags.DEFINE_string("out", None, "folder to write; default: report in the first --workdir", flag_values=values)
    parsing.read_flags(argv, values, __doc__, "--workdir=DIR")
    if not values.workdir:
        raise InputError("--workdir: missing; give the folder of a run")
    for shown in pages.build(values.workdir, values.out):
        conclusion = shown.summary.conclusion
        about = f"{shown.name}: {conclusion.answer}. {'; '.join(conclusion.reasons)}."
        versus = [f"{sentence}." for sentence in shown.versus]
        for text in (about, *(f"  {text}" for text in (*versus, *shown.summary.alerts, *shown.notes))):
            print(printable(text, sys.stdout.encoding))
    print(f"written to {values.out or values.workdir[0].rstrip('/') + '/report'}/index.html")


if __name__ == "__main__":
    exits.run(main)
