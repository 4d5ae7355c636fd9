"""What a sentence or the words behind "the answer is" state: "The total is 18." states 18, "18 or 19" both.

Words that may change the answer stay in it. Not here: where a completion states its answer (`extraction`). Takes linear
time for a text of up to MAX_STATEMENT characters.
"""

import re

MAX_STATEMENT = 1_000  # characters after "the answer is"
_IN_DOLLARS = r"((?:\\.|[^$\\])*)"  # a price in a formula is \$18
# The second $ before a digit is that of a price, as in "$18. She sells 9 eggs at $2 each", and ends no formula.
_FORMULA = re.compile(
    rf"(?<!\\)\$\${_IN_DOLLARS}\$\$|(?<!\\)\${_IN_DOLLARS}\$(?!\.?\d)|\\\(([^$]*?)\\\)|\\\[([^$]*?)\\\]"
)
_MATH = re.compile(rf"\s*(?:\*\*)?\s*(?:{_FORMULA.pattern})")
_LISTING = re.compile(r"(?:[\s,.*]|and\b|or\b)*")
# A formula is the answer where these words alone stand before it and its part of the sentence ends behind it. Other
# words may change it: at least $5$, $5$ hundred, $13$ (base 8).
_BEFORE_FORMULA = re.compile(
    r"(?:[\s:*,]|\b(?:the|an?|our|value|number|integer|ordered|pair|triple|tuple|point|interval|set|matrix|vector"
    r"|function|polynomial|equation|expression|fraction|sum|total of|only|just|then|that)\b)*"
)
_BEHIND_FORMULA = re.compile(
    r"[\s*]*(?:$|[).:;\]]|,(?!\s*(?:or|and|plus|minus|but|not)\b)|\((?!\s*(?:mod|base|in|or|and|times)\b|\s*[\d$\\]))"
)
# "I don't think the answer is 5", "If the answer is 5, then ...", "A wrong answer is 5": before the word "answer".
DENIED = re.compile(
    r"\b(?:not|\w+n['’]t|cannot|never|(?<!no )(?<!without )doubt|refuse|false|if|suppose|assume|assuming|whether|might"
    r"|could|some say|wrong|incorrect|unless|previous|guess)\b(?!.*\b(?:but|so|hence|thus|therefore|then)\b)",
    re.IGNORECASE,
)
_REMARK = "it|but|because|since|which|as|the|this|that|we|not"
# A dash ends a clause before these words alone: before others it may be a minus, or that of "5 – 10", and what follows
# may change the answer, as in "x+1 – all over 2".
_CLAUSE = re.compile(
    r"[.!?;]?\s+(?:because|since|so|which|as|for|where|when|therefore)\b"
    rf"|,\s+(?:{_REMARK}|so)\b|(?:\s–\s|\s?—\s?)\s{{0,4}}(?i:{_REMARK}|all\s(?:of|are|have|the|these))\b"
    # Not the dot of "12 sq. cm" and "approx. 3.5".
    r"|(?!(?<=\b(?:sq|cu))\.\s[a-z]{1,12}\b|(?<=\bapprox)\.\s[-+−$\\]{0,3}[\d.])[.!?](?:\s|$)|\n"
)
# "B. Alina or C. Ben": the end of the first sentence is not the end of what is stated.
_TWO_CHOICES = re.compile(r"\(?[A-J][).:]\s[^\n]{1,200}?(?:\b(?:or|and)|,)\s+\(?[A-J][).:]\s[^\n]{0,200}")
_IS = re.compile(r"\s(?:is|are|equals)\s(?!not\b)")
# A sentence that says more than one thing, or denies it.
_MORE_SAID = re.compile(
    r"[;?]|\sand\s|\b(?:is|are|equals|was|were)\b.*\b(?:is|are|equals|was|were)\b"
    r"|\b(?:neither|nor|none|no|nothing|never|not|without|except|what|which|how)\b"
    r"|\b(?:half|halves|thirds?|quarters?|twice|double|plus|minus)\b"
    r"|\b(?:thought|said|says|claim(?:s|ed)?|previously|perhaps|maybe|possibly|supposedly|seem(?:s|ed)?)\b",
    re.IGNORECASE,
)
_NO_SUBJECT = re.compile(r"[\d$\\]|\b[B-J]\b|\bA\b(?!\s+[a-z])")  # 18 is the total, (A) is 5: not before "is"
_STATED = re.compile(r"[\d$\\]|^\(?[A-J]\)?$")  # and not "the total", which may stand behind "Five is"
_NAMED = re.compile(r"\b(?:angle|arc|side|segment|line|point|triangle|circle|vertex)\s[A-Z]{1,3}\b")  # no choice
# "It takes 12 days": a verb before the only number of a sentence, which says the number alone.
_VERB = re.compile(
    r"\s(?:was|were|takes?|took|has|have|had|needs?|needed|earns?|earned|makes?|made|costs?|weighs?|spent|saved|paid|sold"
    r"|bought|got|received|used|collected|scored|gained)\s(?:home\s|a\stotal\sof\s)?(?=[$\d])"
)
_NUMBER = re.compile(r"\d[\d.,/]*")
_CHANGED = re.compile(
    r"\b(?:or|than|to|from|of|per|times|more|less|fewer|by|out|least|most|about|nearly|almost|over|under|up|between|half"
    r"|hundred|thousand|million|billion|dozens?|may|might|would|one|other|others|another|nobody|hardly|only)\b"
    r"|[-+*/%^=<>()]",
    re.IGNORECASE,
)
# Markdown's bold, and what may stand beside an answer without a word. x**2 is a power, and a cross denies.
_BOLD = re.compile(r"(?<![\w*)\]}$])(\*{2,3})(?![\s*])([^*\n]+)(?<!\s)\1(?![\w*(])")
_DECORATION = " \t\r\n*✅✔☑🎉🎯\ufe0f"
MORE = re.compile(r"[\d$\\]")  # in what follows the first clause of a sentence: perhaps a second answer
_OPEN_END = re.compile(r"\b(?:or|and)[\s,]*$")  # "5 or, since n is odd, 6" is cut behind "or"
# Words between "the answer is" and the answer, words that are not an answer, and words about one that was given before.
_FILLERS = re.compile(
    r"(?:\s*(?:indeed|therefore|thus|hence|simply|just|clearly|obviously|then|now|actually|definitely|really|certainly"
    r"|also|again|still|currently|exactly|precisely|equal to|given by|as follows|for sure|of course"
    r"|(?:right )?(?:t?here|below)(?=:))\b[,:]?)+\s*",
    re.IGNORECASE,
)
_NO_ANSWERS = (
    "and or but if so as in on at by to for from of that this these those there it its he she we you they what which "
    "who how why when where because since with without wrong incorrect mistaken unclear unknown uncertain unsure "
    "undetermined pending missing different too very quite probably likely maybe perhaps going based derived found "
    "obtained computed calculated determined given written shown stated simplified rounded expressed required needed "
    "wanted expected supposed asking asked left your my our their his her only always usually sometimes often indeed "
    "therefore thus hence not"
)
_NO_ANSWER = re.compile(rf"(?:{'|'.join(_NO_ANSWERS.split())})\b[^\d$\\]*", re.IGNORECASE)


def of_sentence(block: str) -> str:
    """Returns what a block says if it is one sentence, as "The total is 18."; any other block as it is."""
    subject, *stating = _IS.split(block[:MAX_STATEMENT], maxsplit=1)
    # "The sum of both x and y is 5" says one thing.
    says = f"{subject.replace(' and ', ' ')} is {stating[0]}" if stating else block
    if len(block) > MAX_STATEMENT or "\n" in block or _MORE_SAID.search(says) or DENIED.search(block):
        return block
    _, *more = _CLAUSE.split(block, maxsplit=1)
    if MORE.search("".join(more)) or (stating and _is_unclear(subject)):
        return block
    if not (stating or _FILLERS.match(block) or _counted(block.rstrip("."))):
        return block
    stated = said(block)
    return stated if stated and _STATED.search(stated) else block


def _is_unclear(subject: str) -> bool:
    """Returns whether what stands before "is" may itself be the answer, as in "18 is the total" or "(A) is 5"."""
    return bool(_NO_SUBJECT.search(_NAMED.sub("", subject)))


def leads_to_answer(words: str) -> bool:
    """Returns whether words such as "The area is" lead to an answer that they neither change nor deny."""
    return not any(pattern.search(words) for pattern in (_NO_SUBJECT, _MORE_SAID, DENIED, _CHANGED))


def _counted(sentence: str) -> str | None:
    """Returns the "12 days" of "It takes 12 days", None where other words may change the number, or there are two."""
    subject, *counted = _VERB.split(sentence, maxsplit=2)
    if len(counted) != 1 or _is_unclear(subject) or len(_NUMBER.findall(counted[0])) != 1:
        return None
    patterns = (_CHANGED, _MORE_SAID, DENIED, _IS)
    return None if any(pattern.search(sentence) for pattern in patterns) else counted[0]


def undecorated(text: str) -> str:
    """Returns the text without the stars of Markdown's bold, and without check marks and blanks at its ends."""
    return _BOLD.sub(r"\2", text).strip(_DECORATION)


def said(rest: str) -> str | None:
    """Returns the clause behind "answer is" without the words that only lead to it; None for no answer."""
    rest = _BOLD.sub(r"\2", rest.lstrip()).lstrip("*").lstrip()
    rest = _FILLERS.sub("", rest, count=1) if _FILLERS.match(rest) else rest
    stated = undecorated(_clause(rest))
    stated = _counted(stated) or stated
    is_none = stated in ("", "\\boxed{}") or _NO_ANSWER.fullmatch(stated) or _OPEN_END.search(stated)
    return None if is_none else stated


def _clause(text: str) -> str:
    """Returns the clause that `text` begins with, or its formula alone where no word beside it may change it."""
    if choices := _TWO_CHOICES.match(text):
        return choices[0]
    first = _MATH.match(text)
    start = first.end() if first else 0
    clause = text[:start] + _CLAUSE.split(text[start:], maxsplit=1)[0]
    if not first:
        *subject, clause = _IS.split(clause)  # "The largest n is 34"
        clause = _FILLERS.sub("", clause, count=1) if subject and _FILLERS.match(clause) else clause
    formula = _FORMULA.search(clause)
    if formula is None:
        return clause
    is_list = len(_FORMULA.findall(clause)) > 1 and _LISTING.fullmatch(_FORMULA.sub("", clause))  # $1$ or $2$
    is_alone = _BEFORE_FORMULA.fullmatch(clause, 0, formula.start()) and _BEHIND_FORMULA.match(clause, formula.end())
    if is_list:
        return clause
    inside = lambda formula: formula[formula.lastindex]  # without the signs around it
    return inside(formula) if is_alone else _FORMULA.sub(inside, clause)
