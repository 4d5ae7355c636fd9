"""The errors that a command reports as one line: wrong input, and a run that cannot go on."""


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: the field, its value, and what to do."""


class RunError(Exception):
    """A run or a command cannot go on, through no fault of its settings. The message is one line: what, and the fix."""


def one_line(message: object) -> str:
    """Returns an error, or any other text, as one line: every run of white space becomes one blank."""
    return " ".join(str(message).split())


def quoted(text: str) -> str:
    """Returns the beginning of a text of any length, at most 60 characters, as it stands in a message."""
    return repr(text[:60] + "..." * (len(text) > 60))


def shown(value: object) -> str:
    """Returns the beginning of any object, at most 80 characters in one line, as it stands in a message."""
    return one_line(repr(value))[:80]


def both_ends(text: str) -> str:
    """Returns a text of at most 300 characters whole, and of a longer one its beginning and its end.

    Errors of tensorstore begin with paths and options, and end with the cause, such as "No space left on device".
    """
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


def named(error: BaseException) -> str:
    """Returns the kind of an error and its message as one line of at most 300 characters."""
    return one_line(f"{type(error).__name__}: {error}")[:300]
