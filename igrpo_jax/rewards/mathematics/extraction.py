r"""Where a completion states its final answer: the last box, `<answer>`, GSM8K's `####`, or "the answer is".

Only statements count. A completion that ends in a number without saying that it is the answer has none, and nothing
inside `<think>` counts once something follows it. Not here: whether the answer is right. Linear time throughout.
"""

import collections
import re

MAX_TEXT = 200_000  # characters of a completion that are read, from its end
MAX_STATEMENT = 1_000  # characters after "the answer is"

# One pass over boxes, escaped characters (so that \{ does not count) and braces. `\\boxed{` comes from escaping twice;
# `\boxed 2` without braces counts at the end of a formula only, because prose speaks of \boxed as well.
_BRACES = re.compile(
    r"\\{1,2}(?:boxed|fbox)\s{0,16}\{|\\boxed\s{0,4}(-?[\w.]{1,20})\s{0,4}\.?\s{0,4}(?=\$|\\\)|\\\])|\\.|[{}]",
    re.DOTALL,
)
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:eos|pad|bos)>|<(?:end|start)_of_turn>")
_PHRASE = re.compile(r"\banswer\s{0,4}(?:(?:is\b|:|=|\*\*:|:\*\*)\s{0,4}:?|(?=\$|\\\(|\\\[))", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(([^$]*?)\\\)|\\\[([^$]*?)\\\]")
_MATH = re.compile(rf"\s*(?:\*\*)?\s*(?:{_FORMULA.pattern})")
_LISTING = re.compile(r"(?:[\s,.*]|and\b|or\b)*")
_SAID = re.compile(r"\d|\bnot\b")  # beside a formula: 3 $\pi$, not $5$
_CLAUSE = re.compile(
    r"[.!?;]?\s+(?:because|since|so|which|as|for|where|when|therefore)\b"
    r"|,\s+(?:it|but|because|since|so|which|as|the|this|that|we|not)\b|[.!?](?:\s|$)|\n"
)
_IS = re.compile(r"\s(?:is|are|equals)\s(?!not\b)")

# Between two boxes that state one answer together: "and", "or", a comma; closing and opening of formulas; "x =".
_FILLER = r"(?:[\s$~]|\\[,;:!()\[\]]|\\q?quad(?![A-Za-z]))*"
_WORD = r"(?:\\(?:text|textrm|mbox|mathrm)\s?\{\s*(and|or)\s*\}|(and|or)\b|,)"
_NAME = r"(?:[A-Za-z]\w?(?:_\{?\w\}?)?(?:\([a-z]\))?\s*=)?"
_JOINED = re.compile(rf"{_FILLER}(?:,{_FILLER})?{_WORD}{_FILLER}{_NAME}{_FILLER}")
_LONGEST_JOIN = 80  # characters between two boxes


def extract(text: str) -> str | None:
    """The final answer stated in `text`, or None where it states none.

    Looked for, in this order: the last `<answer>…</answer>`, the last balanced `\\boxed{…}`, GSM8K's `#### …`, and
    "the answer is …" / "Answer: …". Where something follows `</think>`, only what follows it is read. Boxes joined by
    nothing but "and", "or" or a comma state one answer together: `\\boxed{1} or \\boxed{2}` is "1 or 2", and no guess
    among the two is right; of any other boxes the last counts, alone. Of a text beyond MAX_TEXT characters only the
    end is read.
    """
    text = _SPECIAL.sub(" ", text[-MAX_TEXT:])
    thought, closed, after = text.rpartition("</think>")
    if closed:
        text = after if after.strip() else thought
    head, closed, _ = text.rpartition("</answer>")
    if closed:
        _, opened, block = head.rpartition("<answer>")
        if opened and block.strip():
            return last_box(block) or _statement(block) or block.strip()
    return last_box(text) or _after_hashes(text) or _statement(text)


def last_box(text: str) -> str | None:
    """Content of the non-empty balanced box that ends last, with those joined to it; of nested boxes, the inner one."""
    boxes = _boxes(text)
    if not boxes:
        return None
    content = [_content(text, boxes[-1])]
    for box, after in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        gap = after.opened - box.closed
        match = _JOINED.fullmatch(text, box.closed, after.opened) if 0 < gap <= _LONGEST_JOIN else None
        if match is None:
            break
        content.insert(0, f" {match[1] or match[2]} " if match[1] or match[2] else ", ")
        content.insert(0, _content(text, box))
    return "".join(content)


_Box = collections.namedtuple("_Box", "opened start end closed escaped")


def _boxes(text: str) -> list[_Box]:
    """The last few non-empty boxes, in order, without those that hold another."""
    open_braces: list[tuple[int, int, bool] | None] = []  # of a box where it and its content start, None of a brace
    found: collections.deque[_Box] = collections.deque(maxlen=32)
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            box = open_braces.pop() if open_braces else None
            holds_another = box is not None and bool(found) and box[1] < found[-1].opened
            if box is not None and not holds_another and text[box[1] : match.start()].strip():
                found.append(_Box(box[0], box[1], match.start(), match.end(), box[2]))
        elif token == "{":
            open_braces.append(None)
        elif match[1]:
            found.append(_Box(match.start(), match.start(1), match.end(1), match.end(1), False))
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((match.start(), match.end(), token.startswith("\\\\")))
    return list(found)


def _content(text: str, box: _Box) -> str:
    content = text[box.start : box.end].strip()
    return content.replace("\\\\", "\\") if box.escaped else content


def _after_hashes(text: str) -> str | None:
    _, found, rest = text.rpartition("####")
    return (rest.strip().split("\n", 1)[0].strip() or None) if found else None


def _statement(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", to the end of its clause."""
    matches = collections.deque(_PHRASE.finditer(text), maxlen=1)
    if not matches:
        return None
    last = matches[0]
    rest = text[last.end() : last.end() + MAX_STATEMENT]
    clause = _CLAUSE.split(rest.lstrip().lstrip("*").lstrip(), maxsplit=1)[0]
    math = _MATH.match(rest)
    if not math:
        clause = _IS.split(clause)[-1]  # "The largest n is 34"
    formulas = list(_FORMULA.finditer(clause))
    outside = _FORMULA.sub("", clause)
    if len(formulas) > 1 and _LISTING.fullmatch(outside):  # $1$ or $2$
        math = None
    elif len(formulas) == 1 and not _SAID.search(outside):
        math = math or formulas[0]
    stated = next(group for group in math.groups() if group is not None) if math else clause
    stated = stated.strip().strip("*").strip()
    return None if stated in ("", "\\boxed{}") else stated
