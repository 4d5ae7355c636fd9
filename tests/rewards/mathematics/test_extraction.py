"""igrpo_jax.rewards.mathematics.extraction: where a completion states its answer."""

import time
import timeit

import pytest

from igrpo_jax.rewards.mathematics import extraction
from igrpo_jax.rewards.mathematics.extraction import extract

EXTRACTED = [
    # headings without a colon
    ("**Final Answer**\n\n\\(\\frac12\\)", r"\frac12"),
    ("**Final Answer**\n\\[\\frac12\\]", r"\frac12"),
    ("### Final Answer\n\n$$\n\\frac12\n$$", r"\frac12"),
    ("## Answer\n\n**1/2**", "1/2"),
    ("## Final Answer\n\n**5**\n\nDone.", "5"),
    ("**Answer**\n**5**", "5"),
    ("**Answer**\n$x+1$", "x+1"),
    ("**Answer**\nSome words.", None),
    (r"$\text{The answer is } \$18$", r"\$18"),
    ("<answer>The first root is 5, the second is 6.</answer>", "The first root is 5, the second is 6."),
    ("<answer>The first is 5.\nThe second is 6.</answer>", "The first is 5.\nThe second is 6."),
    ("<answer>The total is not 18.</answer>", "The total is not 18."),
    ("<answer>I doubt that the total is 18.</answer>", "I doubt that the total is 18."),
    ("<answer>The total is 18, as wanted.</answer>", "18"),
    # blocks that say more than one thing, or whose answer may stand before "is"
    ("<answer>5 is the answer</answer>", "5 is the answer"),
    ("<answer>18 is the total</answer>", "18 is the total"),
    ("<answer>Five is the total</answer>", "Five is the total"),
    ("<answer>(A) is 5</answer>", "(A) is 5"),
    ("<answer>Option B is 5</answer>", "Option B is 5"),
    ("<answer>A is 5</answer>", "A is 5"),
    ("<answer>A total of apples is 5</answer>", "5"),
    ("<answer>The correct choice is (B)</answer>", "(B)"),
    ("<answer>Neither is 5</answer>", "Neither is 5"),
    ("<answer>None is 5</answer>", "None is 5"),
    ("<answer>What is 3 + 2</answer>", "What is 3 + 2"),
    ("<answer>Half of it is 5</answer>", "Half of it is 5"),
    ("<answer>No root is 5</answer>", "No root is 5"),
    ("<answer>The total is never 5</answer>", "The total is never 5"),
    ("<answer>The total is 18; the rest is 3</answer>", "The total is 18; the rest is 3"),
    ("<answer>Each is 5 and the total is 10</answer>", "Each is 5 and the total is 10"),
    ("<answer>The cost is $18 and the tax is $2.</answer>", "The cost is $18 and the tax is $2."),
    (r"<answer>The value of $x$ is $18$.</answer>", "The value of $x$ is $18$."),
    # prices in formulas
    (r"The answer is $\$18$.", r"\$18"),
    (r"**Answer:** $\$18$", r"\$18"),
    (r"The answer is $$\$1{,}234$$.", r"\$1{,}234"),
    (r"The answer is $\$1{,}234$, as shown.", r"\$1{,}234"),
    (r"<answer>The answer is $\$18$.</answer>", r"\$18"),
    (r"The answer is $\$1$ or $\$2$.", r"$\$1$ or $\$2$"),
    # a bare price, and a later one
    ("The answer is $18. She sells 9 eggs at $2 each.", "$18"),
    ("Answer: $18\nEach egg costs $2.", "$18"),
    ("The final answer is $18.\n\nLet me verify: 9 * $2 = $18.", "$18"),
    ("**Answer:** $18\n\n- price: $2", "$18"),
    ("The answer is **$18**. Each costs $.50.", "$18"),
    ("The answer is $1,800. He pays $900 twice.", "$1,800"),
    ("The answer is $18 million. He paid $2.", "$18 million"),
    ("The answer is $18 or $20.", "$18 or $20"),
    ("The answer is $18 and $2.", "$18 and $2"),
    ("The answer is $10 more than $8.", "$10 more than $8"),
    ("The answer is at least $18. He has $20.", "at least $18"),
    ("The answer is $18 + $2 = $20.", "$18 + $2 = $20"),
    ("The answer is $18 (that is $9 each).", "$18 (that is $9 each)"),
    ("The answer is $5$. It costs $6 and $7.", "5"),
    # blocks that hold a sentence; tags that are doubled or empty
    ("<answer>The total is 18.</answer>", "18"),
    (r"<answer>Thus, $x = 18$.</answer>", "x = 18"),
    ("<answer>The total cost is $18.</answer>", "$18"),
    ("<answer>There are 5 apples.</answer>", "5 apples"),
    ("<answer>x is not 5</answer>", "x is not 5"),
    ("<answer>The total is 5 or 6</answer>", "5 or 6"),
    ("<answer>18\n</answer>\n</answer>", "18"),
    ("<answer>18</answer><answer></answer>", "18"),
    ("<answer>18</answer>\nDone.\n<answer> </answer>", "18"),
    ("<answer>18</answer> no: <answer>19</answer></answer>", "19"),
    (r"\boxed{18}<answer></answer>", "18"),
    ("<answer>(1, 2), (3, 4)</answer>", "(1, 2), (3, 4)"),
    ("<answer>D. It is 5</answer>", "D. It is 5"),
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
    ("The answer equals $5$.", "5"),
    ("So the answer would be 5.", "5"),
    ("The answer should be $5$.\nI checked it.", "5"),
    ("The answer to the question is 5", "5"),
    ("The answer is 6. The answer should be an integer.", "6"),
    ("The answer is 6. If n were 2, the answer would be 5, but n is odd.", "6"),
    ("The answer is 6. The answer equals the sum.", "6"),
    ("Therefore, answer is 189.\n\nAnother thought", "189"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is B. Alina", "B"),
    ("The answer is B. Alina or C. Ben\nI hope so", "B. Alina or C. Ben"),
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
    # Boxes that state one answer together, and boxes that do not.
    (r"the points $\boxed{(-2,18)}$ and $\boxed{(8,38)}$.", "(-2,18) and (8,38)"),
    (r"$k = \boxed{5}$ or $k = \boxed{-3}$.", "5 or -3"),
    (r"$$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$$", "(2, 2) and (6, 2)"),
    (r"\boxed{1},\boxed{2},\boxed{3}", "1, 2, 3"),
    (r"\boxed{10} and then \boxed{42}", "42"),
    (r"Earlier \boxed{1/3}, later \boxed{2/3}", "2/3"),
    (r"\boxed{9} \boxed{9} \boxed{42}", "42"),
    (r"\boxed{1} and \boxed{2}. Finally \boxed{3}", "3"),
    (r"\boxed{1} and" + " " * 100 + r"\boxed{2}", "2"),
    # A box without braces counts at the end of a formula.
    (r"it follows that $x = \boxed 9$.", "9"),
    (r"\(\boxed42\)", "42"),
    (r"\boxed{42}. As asked, I marked it with \boxed", "42"),
    (r"\boxed{42}, with \boxed 2 times", "42"),
    (r"escaped twice: \\boxed{\\frac{\\pi}{2}}", r"\frac{\pi}{2}"),
    (r"\boxed{42<|im_end|>}<|im_end|>", "42"),
    (r"so the answer is $\boxed{}$.", None),
    # Statements.
    ("The answer is clearly $7$.", "7"),
    ("The answer is not $7$.", "not 7"),
    ("Final Answer: The largest $n$ is 34.", "34"),
    ("The answer is 3 $\\pi$.", "3 \\pi"),
    # Words beside a formula belong to the answer, unless they can't change it.
    ("The answer is $5$ hundred.", "5 hundred"),
    ("The answer is at least $5$.", "at least 5"),
    ("The answer is the square of $5$.", "the square of 5"),
    ("The answer is $5$ apples and $3$ oranges.", "5 apples and 3 oranges"),
    ("The answer is $13$ (base 8).", "13 (base 8)"),
    ("The answer is $12$ cm$^2$.", "12 cm^2"),
    ("The answer is (C) $5$.", "(C) 5"),
    ("The answer is the ordered pair $(3,4)$.", "(3,4)"),
    ("The answer is $x=5$, obtained with $y=3$.", "x=5"),
    ("The answer is $5$ (see above).", "5"),
    ("The answer is $$\n5\n$$", "5"),
    # Sentences that deny or suppose the answer state none, and "or" behind which a clause is cut leaves none.
    ("I don't think the answer is 5.", None),
    ("Suppose the answer is 5.", None),
    ("A common wrong answer is 5.", None),
    ("Not the answer: 5", None),
    ("I'm not sure, but the answer is 7", "7"),
    ("If we add them, the answer is 5.", "5"),
    ("Without doubt the answer is 5.", "5"),
    ("The answer is 4. It cannot be that the answer is 5.", "4"),
    ("The answer is 5 or, since n is odd, 6.", None),
    ("Answer:\n1. Compute 3+4=7.\n2. Hence 7 apples.", None),
    ("Answer:\n1", "1"),
    ("The answer is $x=3$ or $x=4$.", "$x=3$ or $x=4$"),
    ("The answer: D, it cannot be A", "D"),
    ("Is the answer 5?", None),
    # A Markdown heading is no marker; GSM8K's #### is one.
    ("#### Final Answer\nThe answer is 42.", "42"),
    ("The answer is 42.\n\n#### Check\n6*7 = 42, as it should be.", "42"),
    ("#### Step 1\nMultiply.\n#### Step 2\nThe answer is $42$.", "42"),
    ("#### Final Answer:\n42", "42"),
    ("#### **Answer:** 42", "42"),
    ("#### Answer\n$41$ at first; the answer is 42.", "42"),
    ("#### Final Answer\n42", "42"),
    (r"#### Final Answer" + "\n" + r"So \boxed{7}", "7"),
    ("#### Step 1\n3 + 4 = 7\n#### 42", "42"),
    ("#### 1. Compute\nx\n#### 2. Add\nNothing.", None),
    ("The answer is 5.\n#### 2 ways to check\nNo.", "5"),
    ("3 + 4 = 7\n#### Step 3", None),  # cut off
    ("##### 42", None),
    ("She pays for both. #### 18 dollars", "18 dollars"),
    ("#### -3/4\n\nQuestion: how many?", "-3/4"),
    ("#### yes", "yes"),
    ("#### **42**", "42"),
    ("#### 42\nThe answer is 43.", "43"),
    ("#### 42\nI hope the answer is correct.", "42"),
    # "Answer:" inside a formula or a box.
    (r"The last three digits follow." + "\n" + r"\[Answer: 009\]", "009"),
    (r"$\text{Answer: } 9$", "9"),
    (r"\[\text{Answer: } 9\]", "9"),
    (r"\( Answer: 9 \)", "9"),
    (r"$$\text{The answer is } 9$$", "9"),
    (r"$$\text{Thus, the answer is } x = 5$$", "x = 5"),
    (r"So $\text{the answer is }\{1,2\}$.", r"\{1,2\}"),
    (r"\[\textbf{The final answer is: } \frac{1}{2}\]", r"\frac{1}{2}"),
    (r"\boxed{\text{Answer: } 9}", "9"),
    (r"\boxed{\text{The answer is } 9}", "9"),
    (r"\boxed{\text{Answer: 9}}", r"\text{9}"),
    ("It costs $5. The answer is $9$.", "9"),
    # What follows "the answer is" may be filler before an answer, or no answer.
    ("The answer is indeed 332", "332"),
    ("The answer is therefore 9.", "9"),
    ("The answer is right there: 7", "7"),
    ("The answer is below: $7$", "7"),
    ("The answer is there.", None),
    (r"The answer is thus $\frac12$.", r"\frac12"),
    ("The answer is given by $x=3$", "x=3"),
    ("The answer is and", None),
    ("The answer is wrong", None),
    ("The answer is obtained by adding.", None),
    ("The answer is in the box above", None),
    ("The answer is not known.", None),
    ("The answer is 42. I hope the answer is correct.", "42"),
    ("The answer is 42. No, the answer is wrong.", None),
    ("The answer is no solution.", "no solution"),
    ("The answer is Evelyn.", "Evelyn"),
    ("The answer is I.", "I"),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_extract(text, answer):
    assert extract(text) == answer


# Repeated, these make a scanner that looks ahead or back from each of them quadratic.
HOSTILE = [
    *(
        r"\boxed{",
        r"\boxed{1} and ",
        r"\boxed 1",
        "{",
        "}",
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "answer ",
        "answer is ",
        "####",
        "$",
        "\\",
    ),
    *("the answer is $", "the answer is $1 ", "$1 ", "$$1", r"\boxed ", "answer:\n", r"\(", "**", "#### ", "#### 1\n", "####:", "answer\n"),
    *("the answer is correct ", "indeed ", r"\text{Answer: } ", r"\boxed{Answer: 1}"),
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_extract_in_linear_time(piece):
    long = piece * (300_000 // len(piece))
    for text in (long, "answer" + long + "</answer>"):
        # timeit pauses the garbage collector, a pass of which takes a second in a process that has run JAX.
        assert timeit.timeit(lambda text=text: extract(text), timer=time.thread_time, number=1) < 2  # 0.05 as a rule


def test_only_the_end_of_a_very_long_text_is_read():
    filler = "x" * extraction.MAX_TEXT
    assert extract(r"\boxed{1}" + filler) is None
    assert extract(filler + r"\boxed{1}") == "1"
