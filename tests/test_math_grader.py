"""igrpo_jax.rewards.math_grader: what counts as the stated answer, and when two answers are the same."""

import os
import subprocess
import sys
import time

import pytest

from igrpo_jax.rewards import math_grader
from igrpo_jax.rewards.math_grader import equivalent, extract, grade

EXTRACTED = [
    (r"So $x = \boxed{42}$.", "42"),
    (r"\boxed{1} is wrong, so \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{ \boxed{7} }", "7"),
    (r"\boxed {3}", "3"),
    (r"\fbox{3}", "3"),
    (r"\boxed{1} and then \boxed{never closed", "1"),
    (r"\boxed{never closed, \boxed{5}", "5"),
    (r"It is \boxed{4}. I put it in \boxed{}", "4"),
    (r"\boxed{never closed", None),
    (r"\boxed{}", None),
    ("<answer>42</answer>", "42"),
    ("<answer> \n42\n </answer>", "42"),
    ("<answer>1</answer> no: <answer>5</answer>", "5"),
    (r"<answer>$\boxed{4}$</answer>", "4"),
    (r"\boxed{3} <answer>The answer is 4.</answer>", "4"),
    ("<think>3 * 4 = 12</think>\n<answer>12.5</answer>", "12.5"),
    (r"<think>\boxed{42}</think> Hence \boxed{43}.", "43"),
    (r"<think>\boxed{42}</think> Some other text.", None),  # what is only thought is not stated
    (r"<think>so \boxed{42}</think>" + "\n", "42"),  # nothing follows: the thought is all there is
    (r"<think>so \boxed{42}", "42"),
    (r"so \boxed{1}</think><answer>2</answer>", "2"),  # <think> was opened by the template
    ("The answer is 42", "42"),
    ("Therefore, answer is 189.\n\nAnother thought", "189"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is 42 because geometry proves it", "42"),
    ("**Final Answer:** 73", "73"),
    ("Final Answer: **73**", "73"),
    ("Answer: 41 was a guess.\nAnswer: 42", "42"),
    (r"The answer is $\frac{1}{2}$, as shown", r"\frac{1}{2}"),
    (r"the answer is \(x+1\).", "x+1"),
    (r"Answer \[ 9 \]", "9"),
    ("48/2 = 24\n#### 72", "72"),
    ("#### 1\n#### 1,234\nignored", "1,234"),
    ("The perimeter is 7", None),
    ("First compute 6*7.\n42", None),
    ("I have no idea", None),
    ("", None),
]

SAME = [
    ("42", "42"),
    ("-5", "-5"),
    ("+5", "5"),
    ("042", "42"),
    ("1000.0", "1000"),
    (".5", "0.5"),
    ("7,425,000", "7425000"),
    ("1 000", "1000"),
    (r"1\,234.5", "1234.5"),
    (r"12{,}345", "12345"),
    (r"\$32,\! 349", "32349"),
    (r"\$15,\!000", "15000"),
    ("100 dollars", "100"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{9}{7}", r"\frac97"),
    (r"\frac3{3}", "1"),
    (r"-\frac{10}{9}", "-10/9"),
    ("(3)/(4)", "3/4"),
    ("2/4", r"\frac{1}{2}"),
    (r"2\frac{1}{2}", "2.5"),
    (r"-2\frac12", "-5/2"),
    ("12/3", "4"),
    ("-1./3", r"-\frac{1}{3}"),
    (r"28\%", "28 percent"),
    (r"28\%", "0.28"),
    ("28%", "28"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("1500", r"1.5 \times 10^3"),
    (r"\text{Evelyn}", "evelyn"),
    ("(C)", "C"),
    (r"90^\circ", "90"),
    (r"74°", r"74^{\circ}"),
    (r"15\mbox{ cm}^2", "15"),
    (r"10\text{ cm}", r"10 \text{cm}"),
    ("204_5", "204_{5}"),
    ("100_2", "4_{10}"),
    ("$x+1$", "1+x"),
    (r"\sqrt{8}/2", r"\sqrt 2"),
    ("3*sqrt(5)/7", r"\frac{3\sqrt{5}}{7}"),
    ("2**(1/4)", r"\sqrt{\sqrt{2}}"),
    (r"\frac94\pi", r"\frac{9}{4}\pi"),
    ("pi*r^2", r"\pi r^2"),
    (r"\frac{x}{7}+\frac{2}{7}", r"\frac{x+2}{7}"),
    ("k = 1", "1"),
    (r"(1,\frac{9}{2})", "(1, 4.5)"),
    ("1,-2", "-2,1"),
    (r"\{1,2,3\}", r"\{3, 2, 1\}"),
    (r"\left[0,1\right)", "[0,1)"),
    ("x<3", r"(-\infty, 3)"),
    (r"-2 \le x \le 7", "[-2,7]"),
    (r"\begin{bmatrix} 0 & 1 \\ 0 & 2 \end{bmatrix}", r"\begin{pmatrix}0&1\\0&2\end{pmatrix}"),
    (r"\binom{5}{2}", "10"),
    (r"\frac{\pi}{2} \text{ cm}", r"\frac{\pi}{2}"),
]

DIFFERENT = [
    ("42", "43"),
    ("3", "-3"),
    ("", "0"),
    ("0.3333333333", "1/3"),  # a decimal is exact
    ("0.066793", "0.067"),
    ("2.0000001", "2"),
    ("99999999999", "100000000000"),
    ("100000000000000000000", "100000000001000000000"),
    (r"0.5\%", r"50\%"),
    (r"10\text{ cm}", r"10\text{ m}"),
    ("4.5e33", "4.5e32"),
    ("1,2345", "12"),
    ("1 2", "12"),
    ("1, 1", "1"),  # math-verify: the set {1}, and that is 1
    ("3m", "3"),  # math-verify: a unit
    ("204_5", "204_6"),
    ("528", "52_8"),
    ("52", "52_8"),
    (r"2\frac{1}{2}", "1"),  # 2 and a half, not 2 times a half
    ("1/0", "2/0"),
    ("D", "B"),
    ("odd", r"\text{oddd}"),
    ("thorn", "north"),  # the same letters, so the same product of symbols
    ("x", "X"),
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),  # equal within 6 decimals
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    (r"\frac{\sqrt{2}}{10^{9}}", r"\frac{\sqrt{3}}{10^{9}}"),
    ("x+1", "x+2n+1"),
    ("(2, 1)", "(1, 2)"),
    ("(1, 2, 3)", "(1, 2)"),
    ("[1,2]", "(1,2)"),
    ("x > 5", "x < 5"),
    (r"x \le 5", "x < 5"),
    ("1", "2x + z = 1"),
    (r"\sqrt{67}", r"\sqrt{67},-\sqrt{85}"),
    ("1728", r"1331\text{ and }1728"),
    (r"\begin{pmatrix}1 & 2 \\ 3 & 5\end{pmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}"),
    ("3^{2025}", "2^{2025}"),
    ("[]", "2"),
    (r"-\infty", r"\infty"),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_extract(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(("prediction", "gold"), SAME)
def test_same(prediction, gold):
    assert equivalent(prediction, gold)
    assert equivalent(gold, prediction)
    assert equivalent(prediction, prediction)


@pytest.mark.parametrize(("prediction", "gold"), DIFFERENT)
def test_different(prediction, gold):
    assert not equivalent(prediction, gold)
    assert not equivalent(gold, prediction)


def test_grade():
    assert grade("<think>\nhm\n</think>\n<answer>1/2</answer>", "0.5") == (1.0, "1/2", "ok")
    assert grade(r"\boxed{7}", "8") == (0.0, "7", "ok")
    assert grade("no statement of 8", "8") == (0.0, None, "unparseable")


# Repeated, these make a scanner that looks ahead or back from each of them quadratic.
HOSTILE = [
    *(r"\boxed{", "{", "}", "<answer>", "</answer>", "<think>", "</think>", "answer ", "answer is ", "####", "$", "\\"),
    *("the answer is $", r"\boxed ", "answer:\n", r"\(", "**"),
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_extract_in_linear_time(piece):
    start = time.perf_counter()
    extract(piece * (300_000 // len(piece)))
    extract("answer" + piece * (300_000 // len(piece)) + "</answer>")
    assert time.perf_counter() - start < 2  # 0.1 s as a rule


def test_only_the_end_of_a_very_long_text_is_read():
    filler = "x" * math_grader.MAX_TEXT
    assert extract(r"\boxed{1}" + filler) is None
    assert extract(filler + r"\boxed{1}") == "1"


@pytest.mark.parametrize(
    "prediction",
    [
        r"2^{2^{2^{49}}}",
        r"5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)}",
        "9**9**9**9",
        "10^{999999999}",
        r"\binom{1000000}{500000}",
        r"\Gamma(1000000)",
        "1000000!",
        "((9!)!)!",
        "9!!!!!!",
        r"\sum_{k=1}^{1000000000} \frac{1}{k}",
        "7" * 900,
        "(" * 500 + "1" + ")" * 500,
        "x" * 100_000,
        r"\frac{1}{" * 90 + "1" + "}" * 90,
    ],
)
def test_what_sympy_would_choke_on_is_refused_before_it(prediction, monkeypatch):
    monkeypatch.setattr(math_grader, "_symbolic", lambda *_: pytest.fail("it went to sympy"))
    assert not equivalent(prediction, r"\sqrt{2}")


def test_model_text_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in (
        "open('marker', 'w').write('x')",
        "__import__('os').system('touch marker')",
        "(lambda: open('marker', 'w'))()",
        "[open('marker', 'w') for _ in [0]]",
        "getattr(__import__('pathlib').Path('marker'), 'touch')()",
    ):
        assert not equivalent(text, "0")
        assert grade(rf"\boxed{{{text}}}", "0")[0] == 0.0
    assert not os.listdir(tmp_path)


def test_import_is_light():
    # sympy takes seconds to import and jax would claim the accelerator: neither may come with the module.
    code = "import sys, igrpo_jax.rewards.math_grader; print({'sympy', 'math_verify', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
