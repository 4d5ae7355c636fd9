"""The pages of one shard of the batch, as the host counts them: which are free, and how many users each other one has.

A page is a number. Nothing here knows what a page holds, or touches the device.
"""

import math
from collections.abc import Iterable


def pages_for(tokens: float, page_size: int) -> int:
    """Returns how many pages hold `tokens` tokens."""
    return math.ceil(tokens / page_size)


class PagePool:
    """The pages 0 to `count` - 1 of a shard; all are free at first."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))  # a stack: the page freed last is taken first
        self._users = [0] * count

    @property
    def free(self) -> int:
        """How many pages nobody uses."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many pages have a user, a page of several users counted once."""
        return self.count - self.free

    def take(self, count: int) -> list[int]:
        """Returns `count` free pages, which have one user each from now on; that many must be free."""
        assert count <= self.free, f"{count} pages are asked for, {self.free} are free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a user to each of `pages`, which must have one already."""
        for page in pages:
            assert self._users[page], f"page {page} is free and cannot be shared"
            self._users[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Takes a user from each of `pages`; those that have none left are free."""
        for page in pages:
            assert self._users[page], f"page {page} is free and cannot be given back"
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
