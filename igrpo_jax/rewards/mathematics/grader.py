r"""Is the answer stated in a text mathematically equal to the reference answer?

    text -> extract -> prediction -> equivalent(prediction, gold) -> score 0 or 1

`equivalent` reads both answers into their structure (`answers`) and compares the structures (`comparison`). Expressions
are compared by their exact values (`exact`), which decides nearly all of them, right and wrong. The rest (trigonometric
identities, nested roots, sums, unusual notation) goes to math-verify (`symbolic`), behind bounds on its size.

Conventions, where usage differs:

- The last box counts, and no other, unless "and", "or" or a comma joins it to the one before.
- Prose is searched for an answer only where it states one ("the answer is", "Answer:", "####").
  A line such as `#### Step 2` is a heading of Markdown; `####` counts before a number, or before the text's last words.
- 28% equals both 28 and 0.28, because data sets write the same answer in all three ways, but not 0.28%.
- A decimal is exact: 0.333 is not 1/3, and 1.41421356 is not √2. A tolerance would reward rounding a right answer and
  guessing a near one. 0.\overline{3} is 1/3. 0.333... goes on in a way that it does not say: it equals its own text.
  100/3 \approx 33.33 is both, because the second is the first one rounded; \pi \approx 22/7 is the first alone;
  101 \approx 100 is two guesses. "1/3 (about 0.33)", "1/3 or about 0.33" and "3/4 (75%)" are the same with words.
- 1,234 is one thousand two hundred thirty-four, and so is 1{,}234; 3{,}5 is 3.5. A bare comma before one, two, four or
  more digits separates a list: if it were a decimal comma, 1,2 would equal 1.2. 102,204 without blanks is a number or a
  list, whichever the other side means; 100,050 is a number.
- Numbers side by side, or a number behind another factor, are not a product: 2 2, \frac12 12 and x 3 have no value, and
  neither has 3\frac53, which is not a mixed number. Letters behind a slash are one denominator: t/RC is t/(RC), while
  1/2x is x/2.
- A unit, a currency or a degree sign that is missing on one side is forgiven. Two different units are not, unless one
  converts to the other exactly and in one system: 5 g is 0.005 kg. Degrees are not radians, but sin 30° is in degrees.
  2 hours 30 minutes, perhaps with a comma or "and", is 150 minutes and 2.5 hours, but equals no number without a unit.
- 10 m, with a blank, is ten metres or 10 times m, whichever the other side means; 10m is a product. So are 700 nm,
  50 \mu m, 5 \Omega and 5 M_\odot.
- A calculation says its last side where all sides are one number, whatever their units: 5 cm * 4 cm = 20 cm^2 says
  20 cm^2, and 999_{10} = 4343_6 says 4343_6.
- Words behind a number are a unit only where they can't change it: 5 apples is 5, "5 hundred" is 500, "5 or more" is
  no number. "total", "each", "left" and "remaining" say nothing about it. Numbers in words are numbers: "two and a
  half" is 2.5.
- `x = 5` equals 5, and `f(x) = …`, `f'(2) = …`, `a_n = …`, `\tan\theta = …`, `\gcd(a,b) = …` and `\sum … = …` their
  right sides. `x = 5` is not `y = 5`, but f(x) = x is f(n) = n, while f(a) = 3 is a value at a. "For all x" behind
  f(x) = x says nothing unless the sides state two domains: integers are not real numbers. `2x + z = 1`, m + n = 5 and
  \ln x = 5 are equations and nothing else, equal to their multiples. Where several named values meet unnamed ones, the
  order counts, x_1 and x_2 aside. For a point that is the order of x, y; r, \theta; m, b; …, else the written one.
- dx/dt, \frac{d x}{d t} and \dot{x} are one symbol, which is not a quotient. In equations so is x', if nothing
  speaks for another variable. y'(t) is y' times t: arguments of unknown functions are not dropped.
- x = 1 \quad y = 2, and x = 1 and y = 2 on lines of their own, are a list if each defines another letter, and none by
  one of these. Other equations are a derivation, whose end counts: x = 6/2 and x = 3 say 3. With a blank alone,
  x = 1 y = 2 equals nothing. P = 4 s = 20, AC = 2 AB = 10 and a_1 = 2 b_1 = 6 are chains, which end in 20, 10 and 6:
  their names are not all single small letters.
- Lists are unordered and count repetitions (roots with multiplicity), except repeated points. Sets ignore both. A bare
  list equals a set, and it equals a tuple in the same order. A tuple is not a set. (a, b) is a pair or an interval,
  depending on the other side. B(1, 2) is the point (1, 2), but N(0, 1) and f(1, 2) are none. A column equals a row
  vector, ⟨a, b⟩ and (a, b). ± stands for both values. The answer "1/2 or 0.5" is one value.
- A single letter equals `(D)`, `D.`, `(D) Alina`, `D: Alina` and "Option D", but no text that names a second letter.
  Words are compared without case and without an article before them; a single letter keeps its case.
  Words of four and more letters, and capitals such as CD, are names and not products. In equations of nothing else
  they are one symbol each: MR = SRMC is not MR = SMRC.
- k, m or n beside π stands for any integer: kπ, nπ and (k + 1)π are the same answer.
- Several symbols under a root, and symbols in logarithms, are read as positive: \sqrt{a^2b} is a\sqrt b, and |a|\sqrt b
  too, and \ln\frac ab is \ln a - \ln b. But \sqrt{2x^2} is |x|\sqrt2, and \ln x^2 is 2\ln|x|. \cot^{-1} and \sinh^{-1}
  are inverse functions, and log without a base is not taken for ln. \cot^{-1}(-1) equals neither -π/4 nor 3π/4, between
  which usage differs.
- 2:4 is 1:2, but not as times of day.
- \gcd(m,n), lcm and \{x\} in an expression are functions of integers and the fractional part, never of polynomials.
- x \ne \pm2 and x \ge 0, x \ne 2 hold at the same time; x < 0, x > 2 may be meant either way and is a list.
- Digits in a base need their base: 52_8 is neither 52 nor 42. "52 (base 8)" is 52_8.

Not here: limits on time and memory (`rewards/pool`). Model text is never evaluated as Python. No jax; sympy is imported
only when `symbolic` is first used.
"""

import functools
from collections.abc import Collection

from igrpo_jax.rewards.mathematics import answers, comparison, extraction, golds, symbolic
from igrpo_jax.rewards.mathematics.exact import NoValue
from igrpo_jax.rewards.mathematics.nodes import Node

MAX_ANSWER = 1_000  # characters of an answer; a longer one equals nothing (the longest reference of MATH has 159)

extract = extraction.extract


def equivalent(prediction: str, gold: str) -> bool:
    """Returns whether two bare answers, as `extract` returns them, are mathematically equal.

    Symmetric, but for a gold of several answers (`golds.any_of`), any of which is right. An answer that cannot be
    compared (too long, too deep, not parsed) is equal only to its own text. May be slow on hostile input: run it in
    `rewards/pool`.
    """
    several = golds.alternatives(gold)
    if len(several) > 1:
        return any(equivalent(prediction, answer) for answer in several)
    if len(prediction) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return False
    a, b = _read(prediction), _read(gold)
    try:
        return a is not None and b is not None and comparison.same_answer(a, b)
    except NoValue:
        return False


def grade(text: str, gold: str) -> tuple[float, str | None, str]:
    """Returns (score 1.0 or 0.0, extracted answer, "ok" or "unparseable") for the text of a completion."""
    extracted = extract(text)
    if extracted is None:
        return 0.0, None, "unparseable"
    return float(equivalent(extracted, gold)), extracted, "ok"


def accepts_itself(gold: str) -> bool:
    """Returns whether any answer can equal the gold: it is not prose, and `\\boxed{gold}` does. Not for model text."""
    answers_of_gold = map(golds.printed_list, golds.alternatives(gold))
    return any(not _is_prose(answer) and _is_right_for_itself(answer) for answer in answers_of_gold)


def _is_prose(answer: str) -> bool:
    """Returns whether a gold is a text of sentences, or one sentence that its bare number does not equal."""
    if golds.is_prose(answer):
        return True
    number = golds.stated_number(answer)
    return bool(number) and not equivalent(number, answer)


def _is_right_for_itself(answer: str) -> bool:
    extracted = extract(f"\\boxed{{{answer}}}")
    if extracted == answer.strip():  # a text equals itself: no need to read it
        return len(answer) <= MAX_ANSWER
    return extracted is not None and equivalent(extracted, answer)


def classes(predictions: Collection[str | None]) -> list[int]:
    """Returns the class of each answer to one problem, from 0; -1 if there is no answer.

    Equivalent answers have the same number. An answer joins the first class whose first member it is equivalent to. May
    be slow, like `equivalent`.
    """
    firsts: list[str] = []
    by_text: dict[str, int] = {}

    for answer in predictions:
        if answer is not None and answer not in by_text:
            same = (index for index, first in enumerate(firsts) if equivalent(answer, first))
            by_text[answer] = next(same, len(firsts))
            firsts += [answer] if by_text[answer] == len(firsts) else []
    return [-1 if answer is None else by_text[answer] for answer in predictions]


def warm_up() -> None:
    """Does the imports and builds the tables of the first use, which takes seconds. Each worker calls this once."""
    symbolic.warm_up()


def clear_cache() -> None:
    """Forgets the answers that were read so far, for measurements."""
    _read.cache_clear()
    symbolic.equal.cache_clear()


@functools.lru_cache(maxsize=2048)  # completions of a group share the reference answer, and often their own
def _read(answer: str) -> Node | None:
    answer = golds.printed_list(answer)
    return answers.read(extraction.last_box(answer) or extraction.without_lead_in(answer))
