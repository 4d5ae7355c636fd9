"""The file of results: JSON lines that are appended as they come, and read again where a run goes on.

    {"settings": {...}}                                       the first line: what the command was asked to measure
    {"part": "decode", "case": "64 rows, fixed", "figures": {...}}   one measurement
    {"part": "decode", "end": "done", "seconds": 12.3, ...}   the end of a part: "done", "failed" or "late"

A kill can tear the last line at most. A torn line is skipped, and the next one begins on a line of its own.
"""

import json
import os
from pathlib import Path
from typing import Any

from igrpo_jax.errors import InputError


class Results:
    """The results in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "results.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """Returns all rows that are complete, in the order in which they were written."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, which is on the disk when this returns."""
        with open(self.path, "a+b") as file:
            if file.tell() and _last_byte(file) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(row, default=float).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def cases(self, part: str) -> dict[str, dict[str, Any]]:
        """Returns the figures of each case of `part`; the newest of a case counts."""
        return {row["case"]: row["figures"] for row in self.rows() if row.get("part") == part and "case" in row}

    def ends(self) -> dict[str, dict[str, Any]]:
        """Returns the newest end of each part."""
        return {row["part"]: row for row in self.rows() if "end" in row}

    def device(self) -> dict[str, Any] | None:
        """Returns the figures of the device; None where they are not there."""
        return self.cases("device").get("device")

    def open(self, settings: dict[str, Any]) -> None:
        """Makes the folder, and writes `settings` into it or compares them with those that are there.

        Raises:
            InputError: the folder holds results of other settings, or cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.folder}: cannot be made ({error.strerror}); give another folder") from error
        known = next((row["settings"] for row in self.rows() if "settings" in row), None)
        if known is None:
            self.add({"settings": settings})
        elif known != settings:
            raise InputError(
                f"--out {self.folder}: holds results of {_text(known)}, and this is {_text(settings)}; give another "
                "folder"
            )


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
