r"""Finds where a completion states its final answer: the last box, `<answer>`, GSM8K's `####`, or "the answer is".

Only statements count. A completion that ends in a number without saying that it is the answer has none. Nothing inside
`<think>` counts if something follows it. Not here: whether the answer is right. All functions take linear time.
"""

import collections
import re

MAX_TEXT = 200_000  # characters of a completion that are read, at its end
MAX_STATEMENT = 1_000  # characters after "the answer is"

# Matches boxes, braces, and escaped characters, so that \{ does not count as a brace. `\\boxed{` comes from escaping
# twice. `\boxed 2` without braces counts only at the end of a formula, because prose mentions \boxed as well.
_BRACES = re.compile(
    r"\\{1,2}(?:boxed|fbox)\s{0,16}\{|\\boxed\s{0,4}(-?[\w.]{1,20})\s{0,4}\.?\s{0,4}(?=\$|\\\)|\\\])|\\.|[{}]",
    re.DOTALL,
)
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:eos|pad|bos)>|<(?:end|start)_of_turn>")
_PHRASE = re.compile(r"\banswer\s{0,4}(?:(?:is\b|:|=|\*\*:|:\*\*)\s{0,4}:?|(?=\$|\\\(|\\\[))", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(([^$]*?)\\\)|\\\[([^$]*?)\\\]")
_MATH = re.compile(rf"\s*(?:\*\*)?\s*(?:{_FORMULA.pattern})")
_LISTING = re.compile(r"(?:[\s,.*]|and\b|or\b)*")
_BESIDE_FORMULA = re.compile(r"\d|\bnot\b")  # text beside a formula that belongs to the answer: 3 $\pi$, not $5$
_CLAUSE = re.compile(
    r"[.!?;]?\s+(?:because|since|so|which|as|for|where|when|therefore)\b"
    r"|,\s+(?:it|but|because|since|so|which|as|the|this|that|we|not)\b|[.!?](?:\s|$)|\n"
)
_IS = re.compile(r"\s(?:is|are|equals)\s(?!not\b)")

# What stands between two boxes that state one answer together: "and", "or", a comma; ends of formulas; "x =".
_FILLER = r"(?:[\s$~]|\\[,;:!()\[\]]|\\q?quad(?![A-Za-z]))*"
_WORD = r"(?:\\(?:text|textrm|mbox|mathrm)\s?\{\s*(and|or)\s*\}|(and|or)\b|,)"
_NAME = r"(?:[A-Za-z]\w?(?:_\{?\w\}?)?(?:\([a-z]\))?\s*=)?"
_JOINED = re.compile(rf"{_FILLER}(?:,{_FILLER})?{_WORD}{_FILLER}{_NAME}{_FILLER}")
_LONGEST_JOIN = 80  # characters between two boxes


def extract(text: str) -> str | None:
    """Returns the final answer stated in `text`, or None where it states none.

    Searches, in this order, for the last `<answer>…</answer>`, the last balanced `\\boxed{…}`, GSM8K's `#### …`, and
    "the answer is …" / "Answer: …". Where something follows `</think>`, only that is read. Boxes joined by
    nothing but "and", "or" or a comma state one answer together: `\\boxed{1} or \\boxed{2}` is "1 or 2", so that
    guessing twice is not rewarded. Of other boxes only the last one counts. A text beyond MAX_TEXT characters is cut to
    its end.
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
    """Returns the content of the last non-empty balanced box and of those joined to it; of nested boxes, the inner."""
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
    """Returns the last few non-empty boxes, in order, without those that hold another box."""
    open_braces: list[tuple[int, int, bool] | None] = []  # where a box and its content start; None for a plain brace
    boxes: collections.deque[_Box] = collections.deque(maxlen=32)
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            box = open_braces.pop() if open_braces else None
            holds_another = box is not None and bool(boxes) and box[1] < boxes[-1].opened
            if box is not None and not holds_another and text[box[1] : match.start()].strip():
                boxes.append(_Box(box[0], box[1], match.start(), match.end(), box[2]))
        elif token == "{":
            open_braces.append(None)
        elif match[1]:
            boxes.append(_Box(match.start(), match.start(1), match.end(1), match.end(1), False))
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((match.start(), match.end(), token.startswith("\\\\")))
    return list(boxes)


def _content(text: str, box: _Box) -> str:
    content = text[box.start : box.end].strip()
    return content.replace("\\\\", "\\") if box.escaped else content


def _after_hashes(text: str) -> str | None:
    _, hashes, rest = text.rpartition("####")
    return (rest.strip().split("\n", 1)[0].strip() or None) if hashes else None


def _statement(text: str) -> str | None:
    """Returns what follows the last "answer is" or "answer:", to the end of its clause."""
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
    elif len(formulas) == 1 and not _BESIDE_FORMULA.search(outside):
        math = math or formulas[0]
    stated = next(group for group in math.groups() if group is not None) if math else clause
    stated = stated.strip().strip("*").strip()
    return None if stated in ("", "\\boxed{}") else stated
