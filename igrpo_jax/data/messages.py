"""Chat messages in cells of a table: OpenAI's (role, content), ShareGPT's (from, value), or either printed as text."""

import ast
import json
from dataclasses import dataclass
from typing import Any

ROLES = {
    **{"human": "user", "developer": "system"},
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant"),
}


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # "system", "user", "assistant", or what else the file says
    text: str


def parse(value: Any) -> list[Message] | None:
    """Returns the messages in a cell, None if it holds anything else.

    Raises:
        TypeError: a message whose content is not text.
    """
    if isinstance(value, str):
        value = _printed(value)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    if not all("role" in turn or "from" in turn for turn in turns):
        return None
    return [_message(turn) for turn in turns]


def question(turns: list[Message]) -> str:
    """Returns the text of a chat's question: one user's turn, which the system's may precede and a reply may follow.

    Raises:
        TypeError: the chat has other turns.
    """
    asked = turns[:-1] if len(turns) > 1 and turns[-1].role == "assistant" else turns
    if [turn.role for turn in asked] not in (["user"], ["system", "user"]):
        roles = ", ".join(turn.role for turn in turns)
        raise TypeError(f"messages with the roles {roles}, where one user message is expected")
    return "\n\n".join(turn.text for turn in asked if turn.text.strip())


def reply(turns: list[Message]) -> str:
    """Returns the assistant's last turn.

    Raises:
        TypeError: the chat ends with another turn.
    """
    if turns[-1].role != "assistant":
        raise TypeError("messages without a reply from the assistant")
    return turns[-1].text


def _printed(text: str) -> Any:
    """Returns the list or dict that was printed into a text by JSON or Python, None if it is not such a text."""
    if not text.lstrip().startswith(("[{", '{"', "{'")):
        return None
    for read in (json.loads, ast.literal_eval):  # literal_eval builds literals and calls nothing
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _message(turn: dict[str, Any]) -> Message:
    role = str(turn.get("role", turn.get("from")))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "\n\n".join(str(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise TypeError("a message whose content is not text")
    return Message(ROLES.get(role, role), content)
