r"""Finds where a completion states its final answer: the last box, `<answer>`, GSM8K's `####`, or "the answer is".

Only statements count. A completion that ends in a number without saying that it is the answer has none. Nothing inside
`<think>` counts if something follows it. Not here: what a sentence states (`sentences`), and whether the answer is
right. All functions take linear time.
"""

import collections
import re

from igrpo_jax.rewards.mathematics import sentences
from igrpo_jax.rewards.mathematics.sentences import MAX_STATEMENT

MAX_TEXT = 200_000  # characters of a completion that are read, at its end

# Matches boxes, braces, and escaped characters, so that \{ does not count as a brace. `\\boxed{` comes from escaping
# twice. `\boxed 2` without braces counts only at the end of a formula, because prose mentions \boxed as well.
_BRACES = re.compile(
    r"\\{1,2}(?:boxed|fbox)\s{0,16}\{|\\boxed\s{0,4}(-?[\w.]{1,20})\s{0,4}\.?\s{0,4}(?=\$|\\\)|\\\])|\\.|[{}]",
    re.DOTALL,
)
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:eos|pad|bos)>|<(?:end|start)_of_turn>")
_BLOCK = re.compile(r"<answer>([^<]*(?:<(?!/?answer>)[^<]*)*)</answer>")
_VALUE = r"\s{0,4}(?:\*\*)?(?:[-+$\\]{0,3}\d|\$|\\[(\[])"  # what a line begins with that is an answer
_PHRASE = re.compile(
    r"\banswer\s{0,4}(?:(?:(?:to\s(?:the|this)\s(?:question|problem)\s{1,4})?is\b|equals(?=\s{0,4}[-+−]?[\d$\\])"
    r"|(?:would|should)\sbe(?=\s{0,4}(?:\$[^$\n]{1,200}\$|-?[\d,./]{1,40})\s{0,4}(?:\.\s|\.?$|\n))"
    r"|:|=|\*\*:|:\*\*|\}:)\s{0,4}:?"
    r"|(?=\$|\\\(|\\\[)"
    rf"|(?:\*\*)?[ \t]{{0,4}}\n(?={_VALUE}))"
    # A heading: a line of its own with #, in bold, or in a macro.
    r"|^(?P<heading>[ \t]{0,3}(?:#{1,6}[ \t]{1,4}(?:\*\*)?|\*\*|\\(?:(?:sub){0,2}section\*?|textbf|underline)\{)"
    r"(?:the\s)?(?:(?:final|correct)\s)?answer(?:\*\*|\})?[ \t]{0,4}\n)",
    re.IGNORECASE | re.MULTILINE,
)
_BEGINNING = re.compile(_VALUE)
_PART_OF_SENTENCE = re.compile(r"[^.!?,;:\n]*\Z")
_LIST = re.compile(r"[\s*]*1[.)]\s+[A-Z]")  # "Answer:", and then a numbered list

_IN_TEXT_IS = re.compile(r"\\(?:text|textrm|mbox)\s?\{\s*([^{}]*\s(?:is|are|equals))\s*\}\s*(?=\S)")
_TEXT_ALONE = re.compile(r"\\(?:text|textrm|mbox)\s?\{([^{}]*)\}\.?")

_BOLD_BEFORE = re.compile(r"(\*{2,3})[^*\n]*\Z")  # before "answer"


_LAST_STATEMENTS = 8  # how many are tried, from the last one
# Opens a formula in which "The answer is" stands, as in $\\text{The answer is } 9$.
_TEXT = r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s?\{"
_LEAD = r"(?:(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore),?\s)?(?:[Tt]he\s)?(?:(?:[Ff]inal|[Cc]orrect)\s)?"
_MACRO_BEFORE = re.compile(rf"(?:\\[A-Za-z]{{2,16}}\*?\s?\{{|\{{\\[A-Za-z]{{2,12}}\s)\s{{0,4}}{_LEAD}\Z")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WORD_OR_POINT = re.compile(r"(?:[A-Z][a-z]+|\([^()]{1,100}\))\.?")  # an answer in a line under a heading
_INSIDE = re.compile(rf"(\$\$?|\\\[|\\\()\s{{0,4}}({_TEXT}\s{{0,4}})?{_LEAD}$")
_LONGEST_DENIAL = 100  # characters before "answer" that may deny it
_LONGEST_LEAD = 60  # characters between the formula's beginning and "answer"
_CLOSINGS = {"$": "$", "$$": "$$", "\\[": "\\]", "\\(": "\\)"}
_IN_BOX = re.compile(rf"\s*({_TEXT})?\s*{_LEAD}[Aa]nswer\s{{0,4}}(?:is\b|:|=)\s*:?\s*(\}})?")

_CONFIRMED = re.compile(
    r"(?:correct|right|verified|confirmed|consistent|reasonable|valid|above|below|boxed|plausible|sensible)\b[^\d$\\]*",
    re.IGNORECASE,
)

# GSM8K's marker. Other lines that begin with #### are headings.
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_LAST_HASHES = 64  # how many are tried, from the last one
_PLAIN = re.compile(r"[-+−]?[\s$€£¥\\]{0,3}[-+−]?[.\d][\d.,/ ]*[\s$%\\.]{0,4}|\$[^$]+\$\.?|\\\([^$]+\\\)\.?")
_HEADING = re.compile(
    r"[\W_]*(?:\d+\s*[.):]\s*[^\W\d_]|(?:step|part|case|final|answer|the|solution|check|verif|conclu|summary|note"
    r"|explan|method|approach|calculat|comput|given|result|proof|remark|problem|question|analysis|understand)"
    r"|.*:\W*$)",
    re.IGNORECASE,
)

# What stands between two boxes that state one answer together: "and", "or", a comma; ends of formulas; "x =".
_FILLER = r"(?:[\s$~*]|\\[,;:!\s()\[\]]|\\(?:q?quad|enspace|thinspace)(?![A-Za-z])|\\[hv]space\*?\{[^{}]{1,20}\})*"
_IN_TEXT = r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\s?\{\s*"
_COMMA = rf"(?:[,;]|{_IN_TEXT}[,;]\s*\}})"
_WORD = rf"(?:{_IN_TEXT}[,;]?\s*(and|or)\s*\}}|_{{0,2}}(and|or)(?![A-Za-z])_{{0,2}}|{_COMMA})"
_NAME = r"(?:[A-Za-z]\w?(?:_\{?\w\}?)?(?:\([a-z]\))?\s*=)?"
_JOINED = re.compile(rf"{_FILLER}(?:{_COMMA}{_FILLER})?{_WORD}{_FILLER}{_NAME}{_FILLER}")
_LONGEST_JOIN = 80  # characters between two boxes


def extract(text: str) -> str | None:
    """Returns the final answer stated in `text`, or None if it states none.

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
    blocks = [match[1] for match in _BLOCK.finditer(text) if match[1].strip()]
    if blocks:
        block = blocks[-1]
        return last_box(block) or _last_statement(block) or sentences.of_sentence(sentences.undecorated(block))
    return last_box(text) or _last_statement(text)


def last_box(text: str) -> str | None:
    """Returns the content of the last non-empty balanced box and of those joined to it; of nested boxes, the inner."""
    boxes = _boxes(text) if "box" in text else []
    if not boxes:
        return None
    content = boxes[-1].content
    for box, after in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        gap = after.opened - box.closed
        match = _JOINED.fullmatch(text, box.closed, after.opened) if 0 < gap <= _LONGEST_JOIN else None
        if match is None:
            break
        word = match[1] or match[2]
        content = box.content + (f" {word} " if word else ", ") + content
    return content


_Box = collections.namedtuple("_Box", "opened closed content")


def _boxes(text: str) -> list[_Box]:
    """Returns the last few non-empty boxes, in order, without those that hold another box."""
    open_braces: list[re.Match | None] = []  # None for a brace that opens no box
    boxes: collections.deque[_Box] = collections.deque(maxlen=32)
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            box = open_braces.pop() if open_braces else None
            if box and not (boxes and box.end() <= boxes[-1].opened):
                content = text[box.end() : match.start()].strip()
                content = content.replace("\\\\", "\\") if box[0].startswith("\\\\") else content
                boxes += [_Box(box.start(), match.end(), without_lead_in(content))] if content else []
        elif match[1]:
            boxes.append(_Box(match.start(), match.end(1), without_lead_in(match[1])))
        elif token[-1] == "{" and token != "\\{":
            open_braces.append(match if len(token) > 1 else None)
    return list(boxes)


def after_hashes(text: str) -> str | None:
    """Returns what stands after the last `####` that is GSM8K's marker, None if there is none.

    It is a marker before a number or a formula alone, and before anything short at the end of the text. `#### Step 2`
    and `#### Final Answer` are headings of Markdown.
    """
    return _marked(text)[1]


def _marked(text: str) -> tuple[int, str | None]:
    """Returns (where GSM8K's last marker is, what stands behind it)."""
    for match in reversed(collections.deque(_HASHES.finditer(text), maxlen=_LAST_HASHES)):
        content = match[1].strip()
        is_last = len(content) <= MAX_STATEMENT and not text[match.end() : match.end() + MAX_STATEMENT].strip()
        if content and (_PLAIN.fullmatch(content[:MAX_STATEMENT]) or (is_last and not _HEADING.match(content))):
            return match.start(), sentences.undecorated(content)
    return -1, None


def without_lead_in(answer: str) -> str:
    r"""Returns what stands in an answer after "The answer is" or "The area is", both of which may be in \text{…}."""
    match = _IN_BOX.match(answer)
    if match:
        opened, closed = match[1] or "", match[2] or ""
        return ("" if opened and closed else opened + closed) + answer[match.end() :].strip()
    if len(answer) > MAX_STATEMENT:
        return answer
    if sentence := _TEXT_ALONE.fullmatch(answer):
        stated = sentences.of_sentence(sentence[1])
        return answer if stated == sentence[1] else stated
    begun = _IN_TEXT_IS.match(answer)
    if begun and sentences.leads_to_answer(begun[1]):
        return answer[begun.end() :].strip()
    return answer


def _last_statement(text: str) -> str | None:
    """Returns what stands after the last "answer is" or "answer:", or after GSM8K's marker where that comes later."""
    marker, marked = _marked(text)
    for match in reversed(collections.deque(_PHRASE.finditer(text), maxlen=_LAST_STATEMENTS)):
        if match.start() < marker:
            break
        before = _PART_OF_SENTENCE.search(text, max(0, match.start() - _LONGEST_DENIAL), match.start())
        is_list = "\n" in text[match.start() : match.end() + 4] and _LIST.match(text, match.end())
        if is_list or sentences.DENIED.search(before[0]):
            continue
        if match["heading"] and not _BEGINNING.match(text, match.end()):
            if stated := _under_heading(text, match.end()):
                return stated
            continue
        stated = _stated(text, match)
        if stated is None or not _CONFIRMED.fullmatch(stated):  # "I hope the answer is correct"
            return stated or marked
    return marked


def _stated(text: str, phrase: re.Match) -> str | None:
    """Returns what follows "answer is", to the end of its clause or of the formula around both; None for no answer."""
    rest = text[phrase.end() : phrase.end() + MAX_STATEMENT]
    before = "" if phrase["heading"] else text[max(0, phrase.start() - _LONGEST_LEAD) : phrase.start()]
    inside = _INSIDE.search(before)
    if inside:
        closed = re.search(rf"(?<!\\){re.escape(_CLOSINGS[inside[1]])}", rest)
        if closed and rest[: closed.start()].strip(" }\n"):
            return without_lead_in(f"{inside[2] or ''}Answer:{rest[: closed.start()]}")
    if _MACRO_BEFORE.search(before):
        rest = _without_closing(phrase[0], rest)
    bold = _BOLD_BEFORE.search(before)
    return sentences.said(bold[1] + rest.lstrip() if bold and not rest.lstrip().startswith("*") else rest)


def _without_closing(phrase: str, rest: str) -> str:
    r"""Returns what follows "Answer:" without the brace that closes the macro around it, as in \textbf{Answer:} 5."""
    depth = 1
    for brace in _BRACE.finditer(phrase + rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            at = brace.start() - len(phrase)
            return rest[:at] + rest[at + 1 :] if at >= 0 else rest
    return rest


def _under_heading(text: str, start: int) -> str | None:
    """Returns what the line under a heading such as `## Answer` states: one sentence, a word or a point, else None.

    Nothing behind that line may state or deny anything.
    """
    line, _, more = text[start : start + MAX_STATEMENT].strip().partition("\n")
    if text[start + MAX_STATEMENT :].strip() or sentences.MORE.search(more) or sentences.DENIED.search(more):
        return None
    line = sentences.undecorated(line)
    if _WORD_OR_POINT.fullmatch(line):
        return None if more else line
    stated = sentences.of_sentence(line)
    return stated if stated != line else None
