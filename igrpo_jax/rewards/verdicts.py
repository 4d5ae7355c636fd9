"""The file of a judge's verdicts: scores by key in SQLite, shared by the runs of a machine, or by way of a bucket.

SQLite cannot lock a file across machines, so each process of a run has its own file. It needs a disk: a file in a
bucket is copied to one when it is opened, and now and then uploaded together with what others have uploaded in the
meantime. So runs that go on at the same time do not see each other's verdicts, but keep them, unless they upload at
one moment.
"""

import contextlib
import sqlite3
import tempfile
import time
from pathlib import Path

from absl import logging

from igrpo_jax.config import JudgeConfig
from igrpo_jax.errors import InputError
from igrpo_jax.storage.addresses import failures, is_remote, path_of, reason
from igrpo_jax.storage.reading import read_bytes
from igrpo_jax.storage.writing import try_out, upload

SAVED = 60.0  # seconds between two uploads
OPEN_TIMEOUT = 10.0  # seconds to wait for a file that another process has locked
FOLDER = "igrpo_jax_verdicts_"  # how the names of temporary folders begin
TABLE = "CREATE TABLE IF NOT EXISTS {}.verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID"


def named(settings: JudgeConfig) -> Path | None:
    """Returns the path of the file in config.rewards.judge.cache; None if a run has its own."""
    cache = settings.cache
    return path_of(f"config.rewards.judge.cache = {cache!r}", cache) if cache else None


def of_process(path: Path, process: int) -> Path:
    """Returns the file of a process of a run: `path` of the first, and one next to it of each other."""
    return path.with_name(f"{path.stem}.process-{process}{path.suffix}") if process else path


def check(path: Path) -> None:
    """Raises InputError if `path` cannot be used as a file of verdicts. Makes none where there is none."""
    if path.exists():
        Verdicts(path).close()
        return
    try:
        try_out(path)
    except OSError as error:
        raise _refusal(path, error) from error


def _fetched(path: Path, copy: Path) -> Path:
    """Returns `copy`, which then has the contents of the file in a bucket, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        copy.write_bytes(read_bytes(path))
    return copy


def _refusal(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"config.rewards.judge.cache = {str(path)!r}: cannot be used as the file of verdicts ({error}); move it away, "
        "or name another"
    )


class Verdicts:
    """Scores by key in an SQLite file. Once it is open, a failure counts as a miss and logs a warning; it never raises.

    Raises:
        InputError: the file cannot be used.
    """

    def __init__(self, path: Path):
        self._path, self._remote = path, path if is_remote(path) else None
        self._is_new, self._saved = False, time.monotonic()  # whether there are new verdicts, and the last upload
        try:
            path = self._path = self._copied(path) if self._remote else path
            path.parent.mkdir(parents=True, exist_ok=True)
            # The connection is opened in this thread and used in that of the judge's event loop.
            self._connection = sqlite3.connect(
                path, timeout=OPEN_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            self._write_ahead()
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(TABLE.format("main"))
            self._connection.execute("SELECT key, score FROM verdicts LIMIT 1").fetchone()
            self._connection.execute("PRAGMA busy_timeout=200")  # milliseconds, during which the event loop waits
        except failures(sqlite3.Error) as error:
            raise _refusal(self._remote or path, error) from error

    def _copied(self, path: Path) -> Path:
        """Returns a new local file, which no other process has, with the contents of the one in the bucket."""
        self._folder = tempfile.TemporaryDirectory(prefix=FOLDER)  # removed with this object
        return _fetched(path, Path(self._folder.name, "verdicts.sqlite"))

    def save(self, every: float = SAVED) -> None:
        """Uploads the verdicts to the bucket, if there are new ones and the last upload was `every` seconds ago.

        It may be called by another thread than the other methods.
        """
        if not self._remote or not self._is_new or time.monotonic() - self._saved < every:
            return
        self._is_new, self._saved = False, time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
                whole, theirs = Path(folder, "whole"), _fetched(self._remote, Path(folder, "theirs"))
                with (
                    contextlib.closing(sqlite3.connect(self._path)) as source,
                    contextlib.closing(sqlite3.connect(whole, isolation_level=None)) as target,
                ):
                    source.backup(target)
                    target.execute("ATTACH ? AS theirs", (str(theirs),))
                    target.execute(TABLE.format("theirs"))
                    target.execute("INSERT OR IGNORE INTO main.verdicts SELECT key, score FROM theirs.verdicts")
                upload(whole, self._remote)
        except failures(sqlite3.Error) as error:
            self._is_new = True
            logging.warning("judge: the latest verdicts are not in %s: %s", self._remote, reason(error))

    def _write_ahead(self) -> None:
        """Turns on write-ahead logging, so that readers and a writer do not wait for each other.

        When several processes ask a new file for it at once, SQLite refuses some immediately, whatever the time-out, so
        this tries again.
        """
        deadline = time.monotonic() + OPEN_TIMEOUT
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def get(self, key: str) -> float | None:
        """Returns the score of a key, None if there is none."""
        try:
            row = self._connection.execute("SELECT score FROM verdicts WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            logging.log_every_n(logging.WARNING, "judge: the file of verdicts cannot be read: %s", 100, error)
            return None
        return row[0] if row and isinstance(row[0], float) and 0 <= row[0] <= 1 else None

    def put(self, key: str, score: float) -> None:
        """Stores the score of a key."""
        try:
            self._connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, score))
            self._is_new = True
        except sqlite3.Error as error:
            logging.log_every_n(logging.WARNING, "judge: the file of verdicts cannot be written: %s", 100, error)

    def close(self) -> None:
        """Closes the file, and returns once what is new is uploaded; where this fails, a warning says so."""
        self._connection.close()
        self.save(every=0.0)
        if self._remote:
            self._folder.cleanup()
