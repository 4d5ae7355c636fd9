"""igrpo_jax.rewards.mathematics.symbolic: what reaches math-verify, and what is made of its verdict."""

import os

import pytest

from igrpo_jax.rewards.mathematics import symbolic


@pytest.fixture(autouse=True)
def _no_verdict_is_remembered():
    symbolic.equal.cache_clear()


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (r"\sec^2 y", r"\tan^2 y + 1", True),
        (r"\sum_{k=1}^{3} k", "6", True),
        (r"\begin{vmatrix} 2 & 1 \\ 1 & 2 \end{vmatrix}", "3", True),
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False),  # equal within 6 decimals
        (r"\frac{\sqrt{2}}{10^{9}}", r"\frac{\sqrt{3}}{10^{9}}", False),
        (r"0.5\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}\frac{1}{2}\\1\end{pmatrix}", True),
        ("1", "2x + z = 1", False),  # math-verify takes it in one order
        (r"5\ldots", "5", False),  # it would read over the dots
        ("5'", "5", False),
        ("5_3", "5", False),
        (r"5 \mod 7", "5", False),  # it raises
    ],
)
def test_equal(a, b, verdict):
    assert symbolic.equal(a, b) is verdict
    assert symbolic.equal(b, a) is verdict


@pytest.mark.parametrize(
    "answer",
    [
        "2^{2^{2^{49}}}",
        r"5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)}",
        "10^{999999999}",
        r"\binom{1000000}{500000}",
        r"\Gamma(1000000)",
        r"\sum_{k=1}^{1000000000} \frac{1}{k}",
        "1000000!",
        "((9!)!)!",
        "9!!!!!!",
        "9^9^9",
        "7" * 900,
        "x+" * 200 + "x",
        "(" * 20 + "1" + ")" * 20,
        "__import__('os')",
        "|x|y" * 5,
        r"\log x" * 9,
        "sin" * 9 + "x",
    ],
)
def test_what_sympy_would_choke_on_is_refused_before_it(answer, monkeypatch):
    monkeypatch.setattr(symbolic, "_verified", lambda *_: pytest.fail("it went to sympy"))
    assert not symbolic.equal(answer, "1")
    assert not symbolic.equal("1", answer)


def test_model_text_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("open('marker', 'w').write('x')", "(lambda: open(chr(109), 'w'))()", "exec(chr(120))"):
        assert not symbolic._verified(text, "0")
    assert not os.listdir(tmp_path)


def test_running_out_of_memory_is_no_verdict(monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(symbolic, "_verified", exhausted)
    with pytest.raises(MemoryError):
        symbolic.equal("1", "2")
