"""Uploads exports to model repositories of the Hugging Face hub. Those that it creates are private by default.

    open_repository   before any work: is there a token, may it write there, and is the repository free?
    upload            the files of an export, with a model card and MARKER, in one commit

MARKER holds the run's settings and shows that this library made the repository. A repository with other files, or with
the policy of a run with other settings, is never written to. The token is the hub's own (HF_TOKEN, or `hf auth login`);
it is never logged, and answers of the hub are shortened to one line without it.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from igrpo_jax import __version__
from igrpo_jax.config import Config, differences, with_defaults
from igrpo_jax.errors import InputError, RunError, one_line
from igrpo_jax.outputs import card
from igrpo_jax.outputs.files import write_atomically

MARKER = "igrpo_jax.json"
SETTING = "config.checkpoint.push ="  # with which errors begin
# Files that an earlier export may have left, such as shards of another number; the hub keeps them in its history.
_STALE = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"]
_PROVIDED = {".gitattributes"}  # what the hub puts into a new repository


@dataclass(frozen=True)
class Repository:
    """A repository that may be written to."""

    name: str  # "owner/name"
    where: str  # the flag or field that names it, with which errors begin


def open_repository(name: str, where: str, config: Config, private: bool = True) -> Repository:
    """Creates a repository, or checks that the existing one is empty or holds an export of a run like that of `config`.

    Args:
        where: the flag or field that names it.
        private: whether a new repository is private; an existing one stays as it is.

    Raises:
        InputError: no token, or one that may not write there; the repository holds something else.
        RunError: the hub can't be reached.
    """
    if huggingface_hub.get_token() is None:
        raise InputError(
            f"{where} {name}: there is no token for the hub; export HF_TOKEN with one that may write, or log in with "
            "`hf auth login`"
        )
    with _telling(name, where):
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        files = {file.rfilename for file in api.model_info(name).siblings or []} - _PROVIDED
        _check_own(name, where, config, files)
    return Repository(name, where)


def upload(repository: Repository, folder: Path, config: Config, workdir: Path, step: int, place: Path | None) -> str:
    """Uploads the export in `folder`, with a model card and MARKER that it writes there; returns a line about it.

    Args:
        workdir: the run's, whose own evaluations the card reports.
        step: step of the checkpoint that was exported.
        place: where the export stays: `folder`, or the path in a bucket that it is a copy of; None if it is removed.

    Raises:
        InputError, RunError: as `open_repository`.
    """
    adapter = (folder / "adapter_config.json").exists()
    marker = {"version": __version__, "step": step, "settings": card.settings(config)}
    write_atomically(folder / MARKER, json.dumps(marker, indent=2) + "\n")
    write_atomically(folder / "README.md", card.model_card(config, workdir, step, repository.name, adapter))
    with _telling(repository.name, repository.where, f"; the export in {place} is complete" if place else ""):
        api = huggingface_hub.HfApi()
        commit = api.upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            commit_message=f"The policy after step {step}",
            delete_patterns=_STALE,
        )
        visibility = "private" if api.model_info(repository.name).private else "public"
    return f"step {step} is in {api.endpoint}/{repository.name} ({visibility}), commit {commit.oid[:8]}"


def _check_own(name: str, where: str, config: Config, files: set[str]) -> None:
    """Raises InputError if these files of a repository are not an export of a run like that of `config`."""
    if not files:
        return
    fix = "give an unused name of your own, or delete the repository"
    if MARKER not in files:
        raise InputError(
            f"{where} {name}: the repository exists and holds other files, such as {one_line(min(files))[:80]!r}; {fix}"
        )
    try:
        path = Path(huggingface_hub.hf_hub_download(name, MARKER))
        theirs = json.loads(path.read_text(encoding="utf-8"))["settings"]
        changed = differences(with_defaults(theirs, card.settings(Config())), card.settings(config))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} {name}: the repository exists, and its {MARKER} can't be read; {fix}") from error
    if changed:
        raise InputError(
            f"{where} {name}: the repository holds the policy of another run ({one_line(', '.join(changed))[:300]}); "
            f"{fix}"
        )


@contextlib.contextmanager
def _telling(name: str, where: str, kept: str = "") -> Iterator[None]:
    """Turns a refusal by the hub into an InputError, and a failure to reach it into a RunError."""
    try:
        yield
    except hub_errors.HFValidationError as error:
        raise InputError(f"{where} {name}: not the name of a repository ({_plain(error)}); give owner/name") from error
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            fix = f"use a token with write access to {name.partition('/')[0]!r}"
            what = "the hub does not accept the token" if status == 401 else "the token may not write there"
            raise InputError(f"{where} {name}: {what} ({status}: {_plain(error)}){kept}; {fix}") from error
        raise _unreached(name, where, error, kept) from error
    except InputError:
        raise
    except Exception as error:  # the client of the hub, its HTTP library and the system share no base
        raise _unreached(name, where, error, kept) from error


def _unreached(name: str, where: str, error: Exception, kept: str) -> RunError:
    cause = f"{type(error).__name__}: {_plain(error)}"
    return RunError(f"{where} {name}: the hub can't be reached ({cause}){kept}; run the same command again")


def _plain(error: Any) -> str:
    """Returns a message of the hub as a short line without the token."""
    text, token = one_line(error), huggingface_hub.get_token()
    return (text.replace(token, "[token]") if token else text)[:300]
