r"""One spelling for characters and macros that say the same: `x⁴` is x^{4}, \nicefrac12 is \frac12, ]0,1[ is (0,1).

Works on text, before it is cut into `tokens`. Not here: what the text means. Takes linear time.
"""

import itertools
import re
import unicodedata

SEPARATOR = "\x1f"  # stands for a comma that LaTeX marks as part of a number: {,} and ,\!
_LETTERS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi"
)
_COMMANDS = (
    "× times · cdot ⋅ cdot ∞ infty ≤ le ⩽ le ≥ ge ⩾ ge ≠ ne ≈ approx ≡ equiv ± pm ∓ mp √ sqrt ∪ cup ∩ cap ∈ in ∉ notin "
    "∅ emptyset ∖ setminus ⟨ langle ⟩ rangle … ldots ⋯ cdots ¬ neg ∧ land ∨ lor → to ⇒ implies ⇔ iff ⌊ lfloor ⌋ rfloor "
    "⌈ lceil ⌉ rceil ∠ angle △ triangle ∑ sum ∏ prod ∫ int ∂ partial ∘ circ ⊂ subset ω omega ∆ Delta Γ Gamma "
    "Δ Delta Θ Theta Λ Lambda Π Pi Σ Sigma Φ Phi Ψ Psi Ω Omega ℓ ell ∴ therefore"
)
_PAIRS = _COMMANDS.split()
_UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—‒﹣－", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", None),
        **{sign: f"\\{name} " for sign, name in zip(_PAIRS[::2], _PAIRS[1::2], strict=True)},
        **{sign: f"\\{name} " for sign, name in zip("αβγδεζηθικλμνξπρστυφχψ", _LETTERS.split(), strict=True)},
        **{letter: rf"\mathbb{{{unicodedata.normalize('NFKC', letter)}}}" for letter in "ℝℤℕℚℂ"},
        **dict(zip("÷∕∶∣′’“”、", "//:|''\"\",", strict=True)),
        **{"∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "°": r"^\circ ", "º": r"^\circ ", "¢": " cents"},
    }
)
_SLASHED = re.compile(r"(?:\^\{(\d+)\}|(\d+))\s?\u2044\s?(?:_\{(\d+)\}|(\d+))")


def _position(character: str) -> str:
    """Returns "^" for a raised character, "_" for a lowered one, " " for ½ and its like, "" for any other."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return {"<super>": "^", "<sub>": "_", "<fraction>": " "}.get(kind, "")


def _ascii(source: str) -> str:
    """Returns the text with LaTeX instead of Unicode's mathematical characters."""
    pieces = []
    for position, run in itertools.groupby(source.translate(_UNICODE), _position):
        plain = unicodedata.normalize("NFKC", "".join(run))
        pieces.append(f"{position}{{{plain}}}" if position in ("^", "_") else position + plain)
    source = _SLASHED.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", "".join(pieces))
    return source.replace("\u2044", "/").translate(_UNICODE)


_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_SINGLE = r"(\d|[A-Za-z]|\\(?:pi|theta|alpha|beta|lambda|phi|omega|mu)(?![A-Za-z]))"  # an argument without braces
_SEPARATED = re.compile(r"(?<=\d)[ ]?(?:\{[ ]?,[ ]?\}|,[ ]?\\!)(?:\\!|[ ])*(?=\d)")
# Patterns for what is invisible or changes only the look, and their replacements.
_LOOKS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"\\(?:[hv]?phantom|[hvm]space\*?|tag\*?|label)\s*{_GROUP}|\\(?:notag|nonumber)(?![A-Za-z])", " "),
        (r"\\(?:text)?color(?:box)?\s*(?:\[[^][]*\])?\s*\{[^{}]*\}", " "),
        (r"\\(?:underline|ensuremath|mathstrut|smash|mathord|mathop)(?![A-Za-z])", " "),
        (r"\\(?:nice|s|x|flat)frac(?![A-Za-z])", r"\\frac"),
        (rf"(\\[dtc]?(?:frac|binom))(?![A-Za-z])\s*{_SINGLE}", r"\1{\2}"),
        *[(rf"(\\[dtc]?(?:frac|binom)\s*{_GROUP})\s*{_SINGLE}", r"\1{\2}")] * 2,  # twice for a/b in c/d
        (r"\\([ij])math(?![A-Za-z])", r"\1"),
        (r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]|\\(?:cr|newline|tabularnewline)(?![A-Za-z])", r"\\\\ "),
        (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
        (r"\\mathbb\s*\{\s*R\s*\}\s*(?:\^\s*(?:\+|\{\s*\+\s*\})|_\s*\{\s*>\s*0\s*\})", r"(0,\\infty)"),
        (r"\\mathbb\s*\{\s*R\s*\}\s*_\s*\{\s*\\geq?\s*0\s*\}", r"[0,\\infty)"),
        (r"\\mathbb\s*\{\s*([PE])\s*\}(?=\s*(?:\\left)?\s*[(\[])", r"\1"),
        (r"(\\mathbb\{R\})\s*-\s*(?=\\\{)", r"\1\\setminus "),
        (r"(?:\\text\s*\{[^{}]*\}|\()\s*([a-z])\s*\\in\s*\\mathbb\{Z\}\s*\)?$", r", \1\\in\\mathbb{Z}"),
        (r"\\Pr(?=\s*(?:\\left)?\s*[(\[])", "P"),
    )
]
_LOOK = re.compile(
    r"\\(?:[hv]?phantom|[hvm]space|tag|label|no|(?:text)?color|under|ensure|math[sob]|smash|nice|[sx]frac|flat|[ij]math|cr"
    r"|new|tab|Pr|\\)|(?:frac|binom)\s*[^{\s]|\}\s*[\w\\]"
)
_ALIGNED = re.compile(
    r"\\begin\s*\{((?:align|gather|equation|split)(?:ed)?\*?)\}(?:\[[a-z]\])?((?:(?!\\begin)[^\0])*?)\\end\s*\{\1\}"
)
# A system with a brace before it alone, which \right. or nothing closes.
_SYSTEM = re.compile(
    r"(?:\\left\s*)?\\(?:\{|lbrace(?![A-Za-z]))\s*\\begin\s*\{((?:align|gather|split)(?:ed)?\*?|array|matrix)\}"
    r"(?:\[[a-z]\])?(?:\s*\{[lcr| ]*\})?((?:(?!\\begin)[^\0])*?)\\end\s*\{\1\}\s*(?:\\right\s*\.|$)"
)
_AT_SIGN = re.compile(r"&\s*(?=[=<>]|\\[lg]eq?(?![A-Za-z]))|(?<=[=<>])\s*&")
_ROWS = re.compile(r"\\\\\s*(?=(=)?)")
_INFIX = re.compile(r"\{((?:[^{}]|\{[^{}]*\})*)\\(over|choose)(?![A-Za-z])((?:[^{}]|\{[^{}]*\})*)\}")
# An interval whose open ends are written with reversed brackets.
_INTERVAL = re.compile(r"([\[\]])([^\[\],;(){}]+[,;][^\[\],;(){}]+)([\[\]])")


_DOTS = re.compile(r"(?<=[^\s.])\s*\.{2,}")  # 0.333... goes on, unlike ...0.333

_ANGLED = re.compile(r"\s*(?:\\left\s*)?<(?=[^<>=]*,)([^<>=]*?)(?:\\right\s*)?>\s*")  # a vector: <1,2>
_ANGSTROM = re.compile(r"\\AA(?![A-Za-z])")
_UNION = re.compile(r"(?<=[)\]])\s*U\s*(?=(?:\\left\s*)?[(\[])")  # (-\infty, 1] U [2, 3]
_DEGREE = re.compile(r"(\^\s*\{?\s*)?\\(?:text)?degree(?![A-Za-z])")
# A macro of fonts, and contents of one that are no words: those may be a unit or a label.
_FONT = re.compile(
    r"\\(text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|rm|it|sf|tt)|[mh]box|bm|boldsymbol)"
    rf"\s*({_GROUP})(?=\s*([\^_!]?)(\d?))"
)
_NUMERAL = re.compile(rf"\s*(?:\d+|[1-9]\d{{0,2}}(?:[,{SEPARATOR}]\d{{3}})+)(?:\.\d+)?\s*")
_CALCULATION = re.compile(
    r"(?=[^\d]*\d)(?:[\d\s.+*/^(){}-]|\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right)(?![A-Za-z])|\\[,;:! ])+"
)
_POLYNOMIAL = re.compile(r"(?:[\d\s.+*/^(){}-]|[A-Za-z](?![A-Za-z]))+")
_SUM = re.compile(r"[\w)}]\s*[+-]")
_BOLD = frozenset(("mathbf", "bm", "boldsymbol"))
_ARGUMENT = re.compile(r"(?:[\^_}]|\\(?:[dtc]?frac|[dt]?binom|sqrt))\s*$")  # before an argument without braces
_TEXT = r"\\(?:text|textrm|mathrm|mbox|rm)\s*\{\s*"
_TEXT_SIGN = re.compile(rf"{_TEXT}(\\?%|\^\\circ)\s*\}}")  # 25\text{\%}
_RAISED_O = re.compile(rf"(?<=[\d}}])\s*\^\s*(?:o(?![A-Za-z])|\{{\s*o\s*\}}|\{{?\s*{_TEXT}o\s*\}}\s*\}}?)")  # 45^o
_TIMES = re.compile(r"(?<=\d)\s*(?:[xX]|\\text\s*\{\s*[xX]\s*\})\s*(?=10\s*\^)")  # 4.5 x 10^33

# Equations side by side: "x = 1 \quad y = 2", or one a line.
_GAP = re.compile(r"(?:\\q?quad(?![A-Za-z])|\n)(?:\s|\\[,;:! ]|\\q?quad(?![A-Za-z]))*")
_UNENDED = re.compile(
    r"(?:\b(?:and|or|so|if|for|where|when|with|then|because)\s*\}?|\\(?:land|lor|implies|iff|to|[A-Za-z]*arrow)"
    r"|[^\w)}\]%!'|$,;])$"
)
_LETTER = rf"[A-Za-z]|\\(?:{_LETTERS.replace(' ', '|')}|omega|[A-Z][a-z]+)(?![A-Za-z])"
_DEFINED = re.compile(rf"[$\s]*({_LETTER})\s*((?:_\s*(?:\w|\{{[^{{}}]{{1,20}}\}}))?)\s*=(?!=)")
_BRACES = re.compile(r"[\s{}]")
_USED = re.compile(rf"{_TEXT}[^{{}}]*\}}|[A-Za-z]{{4,}}|\\[A-Za-z]+|[A-Za-z]")  # symbols; the words aside


def normal(source: str) -> str:
    """Returns the text in ASCII (letters and money of other scripts aside), with one spelling of macros."""
    if not source.isascii():
        source = _ascii(source)
    source = _SEPARATED.sub(SEPARATOR, source)
    if "\\" in source:
        source = _FONT.sub(_unfonted, source)
    if source.count("=") > 1:
        source = _listed(source)
    if ".." in source:
        source = _DOTS.sub(r"\\ldots ", source)
    if "{.}" in source or "{:}" in source:
        source = re.sub(r"(?:\\text)?\{([.:])\}", r"\1", source)
    if "10" in source:
        source = _TIMES.sub(r"\\times ", source)
    if "\\AA" in source:
        source = _ANGSTROM.sub("Å", source)
    if "<" in source:
        source = _ANGLED.fullmatch(source).expand(r"\\langle \1\\rangle") if _ANGLED.fullmatch(source) else source
    if "U" in source:
        source = _UNION.sub(r"\\cup ", source)
    if "%" in source or "^" in source:
        source = _RAISED_O.sub(r"^\\circ ", _TEXT_SIGN.sub(r"\1", source))
    if "degree" in source:
        source = _DEGREE.sub(lambda match: f"{match[1] or '^'}\\circ ", source)
    if "\\" in source:
        for pattern, replacement in _LOOKS if _LOOK.search(source) else ():
            source = pattern.sub(replacement, source)
        if "\\begin" in source:
            source = _SYSTEM.sub(_as_cases, source)
            source = _ALIGNED.sub(_unaligned, source)
        if "\\over" in source or "\\choose" in source:
            for _ in range(3):  # levels of {a \over b} in {… \over …}
                source = _INFIX.sub(_prefixed, source if "{" in source else f"{{{source}}}")
    if "]" in source or "[" in source:
        source = _unreversed(source)
    return source


def _unfonted(match: re.Match) -> str:
    r"""Returns the 6 of \mathbf{6} and the p - q of \mathbf{p - q}, which a font does not group; units as they are."""
    font, content, sign, digit = match[1], match[2][1:-1], match[3], match[4]
    # Letters in bold alone: \mathrm{m/s} is a unit, and \text{A-B} a label.
    is_sum = font in _BOLD and _POLYNOMIAL.fullmatch(content) and _SUM.search(content)
    is_read = _NUMERAL.fullmatch(content) or (not sign and (is_sum or _CALCULATION.fullmatch(content)))
    if not is_read or _ARGUMENT.search(match.string, max(0, match.start() - 20), match.start()):
        return match[0]
    return f" {content.strip()}{' ' * bool(digit)}"


def _as_cases(match: re.Match) -> str:
    r"""Returns \left\{ \begin{array}{l}x=1\\y=2\end{array} \right. in the environment `cases`."""
    return rf"\begin{{cases}}{_AT_SIGN.sub(' ', match[2])}\end{{cases}}"


def _unaligned(match: re.Match) -> str:
    """Returns the rows of an aligned environment as a list; a row that begins with = continues the one before."""
    rows = re.sub(r"(\\\\|\\&)|&", r"\1 ", match[2]).strip().removesuffix("\\\\")
    return _ROWS.sub(lambda row: " " if row[1] else ", ", rows)


def _listed(source: str) -> str:
    r"""Returns equations that \quad or the end of a line separates as a list: "x = 1 \quad y = 2" as "x = 1, y = 2".

    Each defines another symbol by none of these symbols. Any other lines may be a derivation, whose end is the answer:
    x = 6/2 and x = 3, or s = 5 and P = 4s = 20.
    """
    pieces = [piece for gap in _GAP.split(source) if (piece := gap.strip())]
    defined = [_DEFINED.match(piece) for piece in pieces]
    if len(pieces) < 2 or not all(defined) or any(_UNENDED.search(piece[-60:]) for piece in pieces):
        return source
    names = {_BRACES.sub("", match[1] + match[2]) for match in defined}
    letters = {letter for name in names for letter in _USED.findall(name)}  # the n of a_n = 2n too
    used = {symbol for match in defined for symbol in _USED.findall(match.string, match.end())}
    if len(names) < len(pieces) or letters & used:
        return source
    return ", ".join(piece.rstrip(",;") for piece in pieces)


def _prefixed(match: re.Match) -> str:
    return rf"\{'frac' if match[2] == 'over' else 'binom'}{{{match[1]}}}{{{match[3]}}}"


def _unreversed(source: str) -> str:
    r"""Returns ]0,1[ \cup ]2,3] as (0,1) \cup (2,3]. Text with any other square brackets stays as it is."""
    intervals = _INTERVAL.findall(source)
    if any(ends[0] + ends[2] != "[]" for ends in intervals) and not re.search(r"[\[\]]", _INTERVAL.sub("", source)):
        return _INTERVAL.sub(lambda m: f"{'[' if m[1] == '[' else '('}{m[2]}{']' if m[3] == ']' else ')'}", source)
    return source
