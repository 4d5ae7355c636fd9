"""Says every 15 seconds what `aot` is doing, and when a program is compiled.

The programs of a slice take minutes to compile, during which nothing else would be printed.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

EVERY = 15.0  # seconds between two lines while something lasts


class Progress:
    """Lines about what is under way. Inside a `with` block a thread prints one every `every` seconds.

    Args:
        write: prints a line.
    """

    def __init__(self, write: Callable[[str], None], every: float = EVERY):
        self._write, self._every = write, every
        self._tasks: dict[str, float] = {}  # what is under way, with the time at which it began
        self._compiled = 0  # programs that are compiled
        self._total = 0  # programs to compile; 0 if that is not known yet
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def message(self, text: str) -> None:
        """Prints a line."""
        self._write(text)

    @contextlib.contextmanager
    def doing(self, task: str) -> Iterator[None]:
        """Names `task` in the lines that are printed while the block runs, in any thread."""
        with self._lock:
            self._tasks[task] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._tasks.pop(task, None)

    def expect(self, programs: int) -> None:
        """Notes how many programs will be compiled."""
        self._total = programs

    def compiled(self, text: str) -> None:
        """Counts one more program as compiled, and prints a line about it."""
        with self._lock:
            self._compiled += 1
        self._write(text)

    def line(self) -> str:
        """Returns what is under way, such as "  45 s: compiling apply (31 s); 3 of 11 programs compiled"."""
        now = time.monotonic()
        with self._lock:
            tasks = [f"{task} ({now - began:.0f} s)" for task, began in self._tasks.items()]
            counted = f"; {self._compiled} of {self._total} programs compiled" if self._total else ""
        return f"  {now - self._began:.0f} s: {', '.join(tasks) or 'working'}{counted}"

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self._write(self.line())
