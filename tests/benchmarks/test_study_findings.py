"""What a study found: the tables across its groups by hand, its files, and its page.

What these tests catch: a verdict on a prediction that its interval does not give, a difference of runs with different
seeds, tables that are not those of results.json, a number in docs/study.md that no table of its section holds, and a
setting that is said to have been tried and was not.
"""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs" / "study"
sys.path.insert(0, str(ROOT / "benchmarks"))
study_arms, study_findings, study_report = map(
    importlib.import_module, ("study_arms", "study_findings", "study_report")
)


def results(**arms):
    """The results of arms by name, each with its runs by seed."""
    return {"groups": {}, "arms": {name: {"seeds": seeds, "against": ""} for name, seeds in arms.items()}}


def test_a_prediction_holds_where_the_whole_interval_does():
    """By hand: 1, 2, 3 have the interval 2 ± 2.48, so from -0.48 to 4.48."""
    predicted = lambda low, high: study_findings.verdict(study_arms.Prediction("x", low, high, ""), [1.0, 2.0, 3.0])
    assert predicted(-0.5, 4.5) == predicted(-100, 100) == "held"
    assert predicted(0, 100) == predicted(-100, 4.4) == "open"
    assert predicted(4.5, 100) == predicted(-100, -0.5) == "falsified"


def test_what_is_asked_of_arms_names_arms():
    arms = {arm.name for groups in (study_arms.ARMS, study_arms.LOOKUPS) for group in groups.values() for arm in group}
    assert {prediction.arm for prediction in study_arms.PREDICTIONS} <= arms
    assert {name for contrast in study_arms.CONTRASTS for name in contrast} <= arms


def test_further_pairs_are_of_equal_seeds():
    """The gaps of seeds 0 and 1 are 10 and 12 points: 11 ± 12.7. Seed 2 has no pair."""
    runs = lambda *ends: {str(seed): {"after": end} for seed, end in enumerate(ends)}
    found = study_findings.contrasts(results(igrpo=runs(0.3, 0.52, 0.9), grpo_4=runs(0.2, 0.4)))
    assert "| igrpo | grpo_4 | 2 | +11.0 ± 12.7 |" in found
    assert study_findings.contrasts(results(igrpo=runs(0.3, 0.5, 0.9))) == ""


def test_each_run_is_named_in_order():
    runs = {str(seed): {"after": end} for seed, end in enumerate((0.5, 0.1, 0.9, 0.25))}
    text = study_findings.each_run(results(many=runs, few={"0": {"after": 0.5}}))
    assert text.endswith("| many | 10.0, 25.0, 50.0, 90.0 |")


def test_the_first_steps_are_those_of_drafts_and_of_plain_completions():
    """Steps 1 to 5 and so on are means of 5."""
    series = lambda name, *levels: {"series": {name: [level for level in levels for _ in range(5)]}}
    drafts = {seed: series("draft_accuracy", 0.1, 0.2, 0.3, 0.4) for seed in "01"}
    for run in drafts.values():
        run["series"] |= {"accuracy": [0.9] * 20, "copy_ratio": [0.5] * 20}
    plain = {seed: series("accuracy", 0.1, 0.3, 0.5, 0.7) for seed in "01"}
    half = {seed: series("accuracy", 0.1, 0.15, 0.2, 0.25) for seed in "01"}
    text = study_findings.first_steps(results(dense_igrpo=drafts, dense_grpo=plain, dense_grpo_4=half))
    assert "| dense | 6 to 10 | 20.0 | 30.0 | 15.0 | -10.0 ± 0.0 | +5.0 ± 0.0 | 90.0 | 50.0 |" in text
    assert study_findings.first_steps(results(dense_igrpo=drafts)) == ""


@pytest.mark.parametrize("study", ["arithmetic", "lookups", "second_start", "between"])
def test_the_tables_are_those_of_the_results(study):
    found = json.loads((STUDY / study / "results.json").read_text(encoding="utf-8"))
    assert study_report.tables(found) == (STUDY / study / "tables.md").read_text(encoding="utf-8")


DECIMAL = re.compile(r"\d+\.\d+(?: ± \d+\.\d+)?")


def unfounded(page):
    """The decimal numbers of each section's text that no table of it has, or of the page where it has none.

    A number with its interval has to stand with that interval.
    """
    numbers = lambda rows: {
        part for row in rows for number in DECIMAL.findall(row) for part in (number, number.split()[0])
    }
    table = lambda text: [line for line in text.splitlines() if line.startswith("|")]
    found = []
    for section in re.split(r"^#{2,3} ", page, flags=re.MULTILINE):
        prose = re.sub(
            r"```.*?```|`[^`]*`|^\|.*?$|\]\(.*?\)|arXiv [\d.]+|Qwen\S+", "", section, flags=re.DOTALL | re.MULTILINE
        )
        known = numbers(table(section) or table(page))
        found += [
            number for number in DECIMAL.findall(" ".join(prose.replace(" %", "").split())) if number not in known
        ]
    return found


def test_every_number_of_the_page_is_in_a_file_of_the_study():
    """Whole table rows are of the files, and decimal numbers of the text are of the tables of their section."""
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    files = sorted(STUDY.glob("*/tables.md"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    rows = [line for line in page.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert rows and [row for row in rows if row not in text.splitlines()] == []
    assert unfounded(page) == []
    for picture in re.findall(r"\]\(([^)]+\.png)\)", page):
        assert (ROOT / "docs" / picture).is_file(), picture


def test_departures_are_said_to_be_tried_where_an_arm_has_their_setting():
    """In the table of docs/igrpo.md, whose last cell names the arms."""
    arms = {
        name: set(arm.settings)
        for groups in (study_arms.ARMS, study_arms.LOOKUPS)
        for group in groups.values()
        for arm in group
        for name in (arm.name, re.sub("^(igrpo|sparse|trusting|verifying|critiqued)_", "", arm.name))
    }
    page = (ROOT / "docs" / "igrpo.md").read_text(encoding="utf-8")
    table = page.partition("| in [the study]")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 15
    for row in rows:
        setting = re.findall(r"(?:algorithm|refine)\.\w+", row[0])[0]
        with_it = {name for name, settings in arms.items() if setting in settings}
        assert with_it & set(re.findall(r"\w+", row[-1])) if with_it else row[-1] == "**not tried**", row


def test_numbers_of_other_sections_and_other_intervals_are_seen():
    page = (
        "## A\n\n| x | -1.5 ± 0.2 |\n\n1.5, 1.5 %\n± 0.2, `9.9`, [a](b_9.9), 2.5\n\n"
        "### B\n\n| y | 2.5 |\n\n1.5, 2.5 ± 0.2\n\n## C\n\n1.5, 2.5, 3.5"
    )
    assert unfounded(page) == ["2.5", "1.5", "2.5 ± 0.2", "3.5"]
