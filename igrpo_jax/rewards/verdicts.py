"""The file of a judge's verdicts: scores by key in SQLite, shared by runs and processes."""

import sqlite3
import time
from pathlib import Path

from absl import logging

from igrpo_jax.errors import InputError

OPEN_TIMEOUT = 10.0  # seconds to wait for a file that another process has locked


class Verdicts:
    """Scores by key in an SQLite file. Once it is open, a failure counts as a miss and logs a warning; it never raises.

    Raises:
        InputError: the file cannot be used.
    """

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The connection is opened in this thread and used in that of the judge's event loop.
            self._connection = sqlite3.connect(
                path, timeout=OPEN_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            self._write_ahead()
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID"
            )
            self._connection.execute("SELECT key, score FROM verdicts LIMIT 1").fetchone()
            self._connection.execute("PRAGMA busy_timeout=200")  # milliseconds, during which the event loop waits
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"config.rewards.judge.cache = {str(path)!r}: cannot be used as the file of verdicts ({error}); "
                "move it away, or name another"
            ) from error

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
        """Returns the score of a key, None where there is none."""
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
        except sqlite3.Error as error:
            logging.log_every_n(logging.WARNING, "judge: the file of verdicts cannot be written: %s", 100, error)

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()
