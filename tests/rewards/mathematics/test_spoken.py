"""igrpo_jax.rewards.mathematics.spoken: numbers and operations in words."""

import pytest

from igrpo_jax.rewards.mathematics import spoken
from igrpo_jax.rewards.mathematics.tokens import latex, tokenize


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("seventeen", "17"),
        ("Twenty-One", "21"),
        (r"\text{five hundred and six}", "506"),
        ("two thousand twenty-four", "2024"),
        ("one hundred twenty-three thousand four hundred fifty-six", "123456"),
        ("two million five hundred thousand", "2500000"),
        ("a hundred", "100"),
        ("1.5 million", "1500000"),
        (r"\$1.5\text{ million}", r"\$1500000"),
        ("5 hundred thousand", "500000"),
        (r"\frac{1}{2} \text{ million}", r"\frac{1}{2} \cdot 1000000"),
        ("10 dozen", "120"),
        ("half a dozen", r"\frac{1}{2} \cdot 12"),
        ("two dozen", "24"),
        ("5 eighths", r"\frac{5}{8}"),
        ("one third", r"\frac{1}{3}"),
        ("a quarter", r"\frac{1}{4}"),
        ("two-thirds", r"\frac{2}{3}"),
        ("half", r"\frac{1}{2}"),
        (r"\text{two and a half}", r"2\frac{1}{2}"),
        (r"3 \text{ and a half}", r"3\frac{1}{2}"),
        ("one-and-a-half", r"1\frac{1}{2}"),
        ("one and three quarters", r"1\frac{3}{4}"),
        (r"\text{negative } 5", "-5"),
        ("minus three", "-3"),
        ("negative one half", r"-\frac{1}{2}"),
        ("plus or minus 3", r"\pm 3"),
        ("5 squared", "5^2"),
        ("x cubed", "x^3"),
        ("five factorial", "5!"),
        ("2 plus one", "2+1"),
        ("2 times five", "2*5"),
        ("10 divided by 4", "10/4"),
        ("5 over 8", "5/8"),
        (r"5 \text{ out of } 8", "5/8"),
        ("5 to the power of 3", "5^3"),
        (r"1 \text{ to } 2 \text{ to } 3", "1:2:3"),
        ("three point one four", "3.14"),
        ("20 per cent", r"20\%"),
        ("9 (nine)", "9"),
    ],
)
def test_rewritten(answer, expected):
    assert latex(tokenize(spoken.rewritten(answer))) == latex(tokenize(expected))


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("zero one two three four five six seven eight nine ten eleven twelve", range(13)),
        ("thirteen fourteen fifteen sixteen seventeen eighteen nineteen", range(13, 20)),
        ("twenty thirty forty fifty sixty seventy eighty ninety", range(20, 100, 10)),
        ("hundred thousand million billion trillion lakh crore", [10**k for k in (2, 3, 6, 9, 12, 5, 7)]),
    ],
)
def test_every_word_for_a_number(words, numbers):
    article = "a " * (10**12 in numbers)
    assert [spoken.rewritten(article + word) for word in words.split()] == list(map(str, numbers))


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("half third quarter fourth fifth sixth seventh eighth ninth tenth", [2, 3, 4, *range(4, 11)]),
        ("eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth", range(11, 20)),
        ("twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth", range(20, 100, 10)),
        ("hundredth thousandth millionth billionth trillionth", [10**k for k in (2, 3, 6, 9, 12)]),
    ],
)
def test_every_word_for_a_part(words, numbers):
    assert [spoken.rewritten(f"one {word}") for word in words.split()] == [rf"\frac{{1}}{{{n}}}" for n in numbers]
    plurals = [word.replace("half", "halve") + "s" for word in words.split()]
    assert [spoken.rewritten(f"7 {word}") for word in plurals] == [rf"\frac{{7}}{{{n}}}" for n in numbers]


@pytest.mark.parametrize(
    "answer",
    [
        "5 fifth",
        "1 thirds",
        "2.5 thirds",
        "1/2 thirds",
        "3 and 1/2",  # two answers
        "3 and five halves",
        "-3 squared",
        "5 squared meters",
        "2/3 squared",
        "from 3 to 4",
        "3 to 4 hours",
        "half past",
        "third",
        "5 times",
        "5 times a week",
        "10 minutes to",
        "5 negative",
        "per thousand",
    ],
)
def test_what_is_not_understood_keeps_its_words(answer):
    assert set(spoken.NUMBER_WORDS | spoken.OPERATION_WORDS | {"and"}) & set(spoken.rewritten(answer).split())


@pytest.mark.parametrize(
    "answer", ["", "12", r"\frac{1}{2}", "xy", r"{5 \over 8}", r"3 \times 4", r"\text{tense}", "often"]
)
def test_other_answers_stay_as_they_are(answer):
    assert spoken.rewritten(answer) == answer
