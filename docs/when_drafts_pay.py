"""Writes docs/when_drafts_pay.md from the words in docs/when_drafts_pay.txt and the formulas in the package.

    python docs/when_drafts_pay.py && python docs/when_drafts_pay_figure.py
    python docs/when_drafts_pay.py NAME=PROBE_DIR ...

Every number is computed with igrpo_jax/probe/draft_signal.py; the measured examples are read from the files of the
study. In the words a number is a name in braces (`numbers`), and so is a table. The second command writes the figure.
The third takes what `python -m igrpo_jax.probe` found into docs/study/probes/NAME.json first, without names of folders.
"""

import functools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from igrpo_jax.probe import draft_signal
from igrpo_jax.probe.conclusion import ANSWERS, MORE_AND_GRPO, shown
from igrpo_jax.probe.draft_signal import Signal, igrpo_counts, right_counts, signal, snr_ratio
from igrpo_jax.probe.estimates import Estimate
from igrpo_jax.probe.page import FIGURES

DOCS = Path(__file__).parent
OUT = Path(__file__).with_suffix(".md")
PROBES = DOCS / "study" / "probes"
N, G = 4, 4
P = (0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9)
# (r, w) of a model by p. "repairs" is made up: after a wrong draft it is right five times as often as alone.
MODELS: dict[str, Callable] = {
    "ignores the draft: r = w = p": lambda p: (p, p),
    "copies right drafts: r = 1, w = p": lambda p: (np.ones_like(p), p),
    "r = .7, w = p": lambda p: (np.full_like(p, 0.7), p),
    "repairs: r = .7, w = 5 p, at most .95": lambda p: (np.full_like(p, 0.7), np.minimum(5 * p, 0.95)),
}
IGNORES, COPIES, READS, REPAIRS = MODELS
ALPHA, BETA = 0.3, 1.2  # of the problems' p in the example of a data set


def compared(p: float, model: str) -> tuple[Signal, Signal]:
    """Returns the signals of GRPO (N + G) and iGRPO (N + G) at a success p."""
    return signal(right_counts(p, N + G)), signal(igrpo_counts(p, *MODELS[model](np.float64(p)), N, G))


def ratio(p: float, model: str) -> float:
    """Returns SNR^2 of iGRPO over that of GRPO."""
    refined, plain = reversed(compared(p, model))
    return float(refined.snr_squared / plain.snr_squared)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table."""
    lines = [list(head)] + [[str(cell) for cell in row] for row in rows]
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, "|---" * len(lines[0]) + "|")
    return "\n".join(text)


def main_table() -> str:
    """Returns active groups and the ratio of SNR^2 by p and model."""
    cell = lambda p, model: f"{compared(p, model)[1].active:.3f}, {ratio(p, model):.2f}"
    rows = ((p, f"{compared(p, COPIES)[0].active:.3f}", *(cell(p, model) for model in MODELS)) for p in P)
    return table(("p", "GRPO active", *MODELS), rows)


def scale_table() -> str:
    """Returns the expected squared advantages, and the ratio of SNR^2, of the model that repairs under each scale."""
    rows = []
    for p in (0.01, 0.1, 0.3):
        r, w = MODELS[REPAIRS](p)
        row = [str(p)]
        for scale in ("group", "batch", "none"):
            plain, refined = signal(right_counts(p, N + G), scale), signal(igrpo_counts(p, r, w, N, G), scale)
            ratio_here = refined.snr_squared / plain.snr_squared
            row.append(f"{plain.squared_advantage:.3f}, {refined.squared_advantage:.3f}, {ratio_here:.2f}")
        rows.append(row)
    return table(("p", *(f"`{scale}`: A2, A2, ratio" for scale in ("group", "batch", "none"))), rows)


def split_table() -> str:
    """Returns what splits of 8 and of 16 samples need."""
    p = np.linspace(0.0005, 0.9995, 500)[:, None]
    copies = draft_signal.copying(p, np.linspace(0, 1, 101))
    rows = []
    for drafts, refinements in ((1, 7), (2, 6), (4, 4), (6, 2), (1, 15), (4, 12), (8, 8)):
        others = drafts + refinements - 1
        rest = others - drafts * draft_signal.largest_signal(refinements)
        rows.append(
            (
                f"{drafts} + {refinements}",
                f"{draft_signal.hopeless_from(drafts, refinements):.3f}",
                f"{others / (refinements - 1):.2f}",
                f"{rest / (refinements - 1):.2f}",
                f"{snr_ratio(p, *copies, drafts, refinements).max():.2f}",
            )
        )
    return table(("N + G", "no use above p", "w/p, copied", "w/p, best r", "copies or ignores"), rows)


def variant_table() -> str:
    """Returns the ratio of SNR^2 per sample for early stopping and for training on drafts."""
    rows = []
    for model in (COPIES, REPAIRS):
        for name, value in (("iGRPO", ratio), ("early stop", early_stop), ("trains on drafts", with_drafts)):
            rows.append((model, name, *(f"{value(p, model):.2f}" for p in (0.01, 0.1, 0.3, 0.9))))
    return table(("model", "setting", "p = .01", ".1", ".3", ".9"), rows)


def early_gain(p: float) -> float:
    """Returns how many times as many prompts the same number of samples pays for with early stopping."""
    return float((N + G) / (draft_signal.expected_drafts(p, N) + G))


def early_stop(p: float, model: str) -> float:
    """Returns SNR^2 per sample with early stopping over that of GRPO."""
    return ratio(p, model) * early_gain(p)


def with_drafts(p: float, model: str) -> float:
    """Returns SNR^2 with training on drafts over that of GRPO."""
    plain, refined = compared(p, model)
    both = draft_signal.trained_together(signal(right_counts(p, N)), refined)
    return float(both.snr_squared / plain.snr_squared)


def beta_problems(alpha: float, beta: float, nodes: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Returns values of p and their weights, [nodes] each, whose mean is that over a Beta distribution.

    Gauss-Jacobi quadrature by the eigenvalues of the recurrence (Golub and Welsch 1969): exact for polynomials in p of
    a degree below 2 nodes, which everything here is where r and w are.
    """
    a, b, n = beta - 1, alpha - 1, np.arange(nodes, dtype=float)  # exponents of 1 - x and 1 + x on [-1, 1]
    total = 2 * n + a + b
    diagonal = np.r_[(b - a) / (a + b + 2), (b * b - a * a) / (total[1:] * (total[1:] + 2))]
    n, total = n[1:], total[1:]
    # (n + a + b) / (total - 1) is 1 at n = 1, where both may be 0.
    common = np.r_[1.0, (n[1:] + a + b) / (total[1:] - 1)]
    squared = 4 * n * (n + a) * (n + b) * common / (total**2 * (total + 1))
    x, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(np.sqrt(squared), 1) + np.diag(np.sqrt(squared), -1))
    return (1 + x) / 2, vectors[0] ** 2


def averaged(model: str, alpha: float = ALPHA, beta: float = BETA) -> dict[str, float]:
    """Returns active groups, the ratio of SNR^2, and the r and w that are seen, over Beta distributed problems."""
    p, weight = beta_problems(alpha, beta)
    r, w = MODELS[model](p)
    a = draft_signal.kept_right(p, N)
    plain, refined = (signal(weight @ counts) for counts in (right_counts(p, N + G), igrpo_counts(p, r, w, N, G)))
    return {
        "grpo": float(plain.active),
        "igrpo": float(refined.active),
        "ratio": float(refined.snr_squared / plain.snr_squared),
        "r": float(weight @ (a * r) / (weight @ a)),
        "w": float(weight @ ((1 - a) * w) / (weight @ (1 - a))),
    }


def beta_table() -> str:
    """Returns the example of a data set."""
    rows = []
    for model in MODELS:
        mean = averaged(model)
        shares = f"{mean['grpo']:.3f}", f"{mean['igrpo']:.3f}"
        at_mean = ratio(ALPHA / (ALPHA + BETA), model)
        rows.append((model, *shares, *(f"{x:.2f}" for x in (mean["ratio"], at_mean, mean["r"], mean["w"]))))
    return table(("model", "GRPO active", "iGRPO active", "ratio", "at the mean p", "r seen", "w seen"), rows)


def measured() -> dict[str, tuple[float, float, float]]:
    """Returns p, r and w of the study's two real models, from its files."""
    read = lambda folder: json.loads((DOCS / "study" / folder / "results.json").read_text(encoding="utf-8"))
    qwen, smol = read("probe_qwen05"), read("probe")
    return {
        "Qwen2.5-Coder-0.5B-Instruct, own drafts": tuple(
            qwen[kind]["accuracy"] for kind in ("plain", "own_right", "own_wrong")
        ),
        "SmolLM2-135M-Instruct, given drafts": tuple(smol[kind]["accuracy"] for kind in ("plain", "right", "wrong")),
    }


def measured_table() -> str:
    """Returns the ratio of SNR^2 of the study's two real models."""
    rows = (
        (name, f"{p:.3f}", f"{r:.3f}", f"{w:.3f}", f"{snr_ratio(p, r, w, N, G):.2f}")
        for name, (p, r, w) in measured().items()
    )
    return table(("model", "p", "r", "w", "ratio, 4 + 4"), rows)


# The starts that were probed: the folder of their study in docs/study, and what they are.
PROBED = {
    "trusting": ("arithmetic", "arithmetic, drafts as good as the teacher's"),
    "dense": ("lookups", "look-ups, dense"),
    "sparse": ("lookups", "look-ups, sparse"),
    "rare": ("lookups", "look-ups, rare"),
    "ignoring": ("lookups", "look-ups, ignores drafts"),
    "critiqued": ("critique", "look-ups, hears a critique of drafts"),
    "x60": ("between", "look-ups, x60"),
    "x23": ("between", "look-ups, x23"),
    "x8": ("between", "look-ups, x8"),
}


# What is shown of the probe of a real model.
OF_REAL = (
    *("p", "best", "successes", "r", "alone_right", "w", "alone_wrong", "same_right", "same_wrong"),
    *("plain_active", "refined_active", "ratio", "reliance"),
)


def take(name: str, folder: Path) -> None:
    """Writes what a probe found into docs/study/probes/NAME.json."""
    probe = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
    names = ("problems", "samples", "gradients", "drafts", "refinements", "scale", "conclusion", "figures")
    kept = {key: probe[key] for key in names}
    PROBES.mkdir(parents=True, exist_ok=True)
    (PROBES / f"{name}.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def probe_table() -> str:
    """Returns what a probe of each start of the studies says, and what training then did."""
    rows = []
    for name, (folder, start) in PROBED.items():
        tables = (DOCS / "study" / folder / "tables.md").read_text(encoding="utf-8")
        probe = json.loads((PROBES / f"{name}.json").read_text(encoding="utf-8"))
        cells = (_interval(probe["figures"][key]) for key in ("p", "r", "w", "ratio", "cosine", "reliance"))
        conclusion = f"{probe['conclusion']['behaviour']}; {probe['conclusion']['answer']}"
        observed = (
            re.search(rf"\| {name}_{arm} \| {name}_grpo \| \d+ \| ([^|]+) \|", tables) for arm in ("igrpo", "unsolved")
        )
        rows.append(
            (start, right_in_a_run(name), *cells, conclusion, *(found[1] if found else "" for found in observed))
        )
    return table(("start", "x", "p", "r", "w", "ratio", "k", "rho", "conclusion", "observed", "`unsolved`"), rows)


def real_table() -> str:
    """Returns what a probe of Qwen2.5-Coder-0.5B-Instruct found."""
    found = json.loads((PROBES / "qwen05.json").read_text(encoding="utf-8"))["figures"]
    names = {name: words for section in FIGURES.values() for name, words in section.items()}
    return table(
        ("figure", "value"), [(names[name].replace("|", "\\|"), shown(Estimate(**found[name]))) for name in OF_REAL]
    )


def conclusion_table() -> str:
    """Returns the answers of a probe, and where each is given."""
    failed = "; the study's three such starts lost, [the prediction that failed](#the-prediction-that-failed)"
    return table(("conclusion", "where"), (ANSWERS | {MORE_AND_GRPO: ANSWERS[MORE_AND_GRPO] + failed}).items())


def first_steps_table() -> str:
    """Returns how plain success went in the first steps from the look-ups' starts of equal success."""
    tables = (DOCS / "study" / "lookups" / "tables.md").read_text(encoding="utf-8")
    return tables.partition("## first steps\n")[2].strip().split("\n\n")[1]


def right_in_a_run(name: str) -> str:
    """Returns x, the right answers that GRPO's samples of a run would hold from a probed start without learning."""
    found = json.loads((PROBES / f"{name}.json").read_text(encoding="utf-8"))["figures"]["successes"]
    value, low, high = (f"{found[key]:,.{int(found['high'] < 10)}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _interval(figure: dict[str, float | None]) -> str:
    """Returns a figure with its interval; nothing where it could not be measured."""
    if figure["value"] is None:
        return ""
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    digits = 4 if high is not None and high < 0.1 else 2
    return f"{value:.{digits}f} ({low:.{digits}f} to {'any' if high is None else f'{high:.{digits}f}'})"


def numbers() -> dict[str, object]:
    """Returns the numbers in the text by their names there."""
    edge, edge_none = draft_signal.hopeless_from(N, G), draft_signal.hopeless_from(N, G, "none")
    edge_16 = draft_signal.hopeless_from(2 * N, 2 * G)
    p = np.linspace(0.0005, 0.9995, 1999)
    half = snr_ratio(p, p, p, N, G)
    small = [signal(right_counts(p, size)).snr_squared / ((size - 1) * p * (1 - p)) for size in range(2, N + G + 1)]
    largest, others = draft_signal.largest_signal(G), N + G - 1
    copies = draft_signal.copying(p[:, None], np.linspace(0, 1, 101))
    groups = signal(right_counts(p, N))
    two = draft_signal.trained_together(groups, groups).snr_squared / signal(right_counts(p, N + G)).snr_squared
    problems = beta_problems(ALPHA, BETA)
    return {
        "edge": edge,
        "other_edge": 1 - edge,
        "edge_none": edge_none,
        "other_edge_none": 1 - edge_none,
        "edge_16": edge_16,
        "other_edge_16": 1 - edge_16,
        "copy_times": others / (G - 1),
        "best_times": (others - N * largest) / (G - 1),
        "copy_most": float(snr_ratio(p[:, None], *copies, N, G).max()),
        "tightness": float(np.min(small)),
        "factor": (G - 1) / others,
        "half_low": float(half.min()),
        "half_high": float(half.max()),
        "largest": largest,
        "constant": N * largest / others,
        "slope": (G - 1) / others,
        "bound_one": float(draft_signal.rare_bound(1, N, G, "group")),
        "early_most": early_gain(1.0),
        "early_half": early_gain(0.5),
        "early_rare": early_gain(0.01),
        "two_groups_low": float(two.min()),
        "two_groups_high": float(two.max()),
        "alpha": ALPHA,
        "beta": BETA,
        "mean_p": ALPHA / (ALPHA + BETA),
        "band_limit": (G - 1) / (4 * others),
        "beta_variance": float(problems[1] @ (problems[0] * (1 - problems[0]))),
        "needs_07": others / (G - 1) / 0.7**2,
    }


def wrapped(block: str) -> str:
    """Returns a paragraph or a list in lines of 120 characters; tables, headings, pictures and code as they are."""
    if block.startswith(("|", "#", "!", "    ", "```")):
        return block
    items = [" ".join(item.split()) for item in re.split(r"\n(?=- |\d\. )", block)]
    indents = [" " * len(re.match(r"- |\d\. |", item)[0]) for item in items]
    fill = functools.partial(textwrap.fill, width=120, break_on_hyphens=False)
    return "\n".join(fill(item, subsequent_indent=indent) for item, indent in zip(items, indents, strict=True))


def page() -> str:
    """Returns the text of docs/when_drafts_pay.md."""
    tables = (
        main_table,
        scale_table,
        split_table,
        variant_table,
        beta_table,
        measured_table,
        conclusion_table,
        probe_table,
        real_table,
        first_steps_table,
    )
    words = OUT.with_suffix(".txt").read_text(encoding="utf-8")
    filled = words.format(**numbers(), **{part.__name__: part() for part in tables})
    return "\n\n".join(wrapped(block) for block in filled.strip().split("\n\n")) + "\n"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        take(argument.partition("=")[0], Path(argument.partition("=")[2]))
    OUT.write_text(page(), encoding="utf-8")
