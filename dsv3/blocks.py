"""Blocks of a paged cache: who holds which, and which still hold what a new prompt begins with."""
from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

import numpy as np


class Blocks:
    """Blocks 1 to ``count - 1`` of ``size`` tokens (block 0 is nobody's), lent to sequences and counted.

    A full block is known by the digest of its tokens and of all before them; once returned it keeps its content until its
    place is needed, the longest unused first, and ``match`` lends it again.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = deque(range(1, count))
        self._lent: Counter[int] = Counter()
        self._known: dict[bytes, int] = {}
        self._digest: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # known and lent to nobody, the longest unused first

    @property
    def free(self) -> int:
        """How many can be taken, those that keep something included."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """How many of the free ones keep what they hold."""
        return len(self._kept)

    def take(self, n: int) -> list[int]:
        """n blocks. Raises ValueError when fewer are free."""
        if n > self.free:
            raise ValueError(f"{n} blocks wanted, {self.free} free of {self.count - 1}")
        taken = []
        for _ in range(n):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._kept.popitem(last=False)
                del self._known[self._digest.pop(block)]
            self._lent[block] = 1
            taken.append(block)
        return taken

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the beginning of these digests, as many as there are; they count as lent."""
        found = []
        for digest in digests:
            block = self._known.get(digest)
            if block is None:
                break
            self._lent[block] += 1
            self._kept.pop(block, None)
            found.append(block)
        return found

    def know(self, block: int, digest: bytes) -> None:
        """A lent block is now full, with what this digest stands for. Of two with the same content one is known."""
        if digest not in self._known and block not in self._digest:
            self._known[digest], self._digest[block] = block, digest

    def give_back(self, blocks: Sequence[int]) -> None:
        """Return what was taken or matched."""
        for block in reversed(blocks):  # the end of a sequence is needed again less often than its beginning
            self._lent[block] -= 1
            if self._lent[block] == 0:
                del self._lent[block]
                if block in self._digest:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def forget(self) -> None:
        """Keep nothing any more, as when params have changed; what is lent stays lent."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._known.clear()
        self._digest.clear()


def digests(tokens: Sequence[int], size: int, before: Sequence[bytes] = ()) -> list[bytes]:
    """One digest for each full block of ``tokens``, of its tokens and of all before them; ``before``: those known already."""
    found = list(before)
    for i in range(len(found), len(tokens) // size):
        content = np.asarray(tokens[i * size:(i + 1) * size], np.int32).tobytes()
        found.append(hashlib.blake2b((found[-1] if found else b"") + content, digest_size=16).digest())
    return found
