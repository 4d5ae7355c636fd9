"""The judge's endpoint: the client that asks it, and what a request that returned no verdict means."""

import email.utils
import os
import time
from collections.abc import Mapping
from typing import Any

from igrpo_jax.config import JudgeConfig
from igrpo_jax.errors import InputError

_TRANSIENT = (408, 409, 425, 429)  # codes that are worth another attempt, besides all from 500


class Failure(Exception):
    """A request that returned no verdict."""

    def __init__(self, detail: str, transient: bool = True, wait: float = 0.0, garbled: bool = False):
        super().__init__(detail)
        self.transient = transient  # worth another attempt
        self.wait = wait  # seconds that the server asks to wait before it
        self.garbled = garbled  # the model replied, but not with a verdict


def connect(settings: JudgeConfig) -> tuple[Any, str]:
    """Returns the client, and the key, which must stay out of the log because servers quote it ("" = no secret).

    Raises:
        InputError: no openai client, no key, or a wrong address.
    """
    try:
        import openai
    except ImportError as error:
        raise InputError(
            f"config.rewards.judge.weight = {settings.weight}: the judge needs the openai client; "
            'pip install "igrpo-jax[judge]"'
        ) from error
    url = settings.base_url or os.environ.get("OPENAI_BASE_URL", "")
    if url and not url.startswith(("http://", "https://")):
        raise InputError(f"config.rewards.judge.base_url = {url!r}: must start with http:// or https://")
    key = os.environ.get(settings.api_key_env, "").strip()
    is_named = settings.api_key_env != JudgeConfig.api_key_env  # a name of the user's own says that there is a key
    if not key and (is_named or not url):
        none = "leave it out if the server" if url else "set config.rewards.judge.base_url to a server that"
        raise InputError(
            f"config.rewards.judge.api_key_env = {settings.api_key_env!r}: no such environment variable; export the "
            f"key in it, or {none} asks for none"
        )
    # The client requires a key in any case. Its own retries are off because they would bypass the budget.
    client = openai.AsyncOpenAI(api_key=key or "none", base_url=url or None, max_retries=0, timeout=settings.timeout)
    return client, key if len(key) >= 8 else ""  # servers without keys are often given "EMPTY" or "x"


def failure_of(error: Exception, timeout: float) -> Failure:
    """Returns the failure that an error of the client stands for."""
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Failure(f"no answer within {timeout} s")
    if isinstance(error, openai.APIStatusError):
        transient = error.status_code in _TRANSIENT or error.status_code >= 500
        wait = _retry_after(error.response.headers)
        asked = f", asks for a wait of {wait:.0f} s" if wait else ""
        return Failure(f"HTTP {error.status_code}{asked}: {error.response.text or error.message}", transient, wait)
    if isinstance(error, openai.APIConnectionError):
        return Failure(f"connection failed: {error.__cause__ or error}")
    if isinstance(error, ValueError | openai.APIResponseValidationError):
        return Failure(f"the server's answer is not JSON: {error}")
    return Failure(f"{type(error).__name__}: {error}", transient=False)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds that the server asks to wait, given as a number or a date; 0 if it does not say."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # nan too
