"""Token ids to text as they come: never half a character, never the beginning of a stop string."""
from __future__ import annotations

from collections.abc import Sequence

from .data.tokenizer import Tokenizer

MISSING = "\ufffd"  # what decoding puts for bytes that are no UTF-8, and for a character whose last bytes are still to come
WAIT = 3            # ids that an unfinished character may still need; after as many more its bytes are wrong, not unfinished
# Of the newest ids, as many as fix the text not yet shown: its own (WAIT, and those of one character), before them three bytes,
# for UTF-8 falls into step again after three whatever came before; and every other id may stand for no byte at all.
WINDOW = 2 * (WAIT + 1 + 4 + 3)


class TextStream:
    """The text of one growing sequence of ids, cut before the first stop string.

    >>> stream = TextStream(tokenizer, stop=["END"])
    >>> text = "".join(map(stream.push, ids)) + stream.finish()

    For byte and byte-level BPE tokenizers ``text`` is ``tokenizer.decode(ids)`` up to the stop string, whatever the bytes; the
    work for an id does not grow with the ids before it. ``done`` turns True when a stop string is complete: the first to be
    so, the longest if several are with the same character; further ids change nothing. Raises ValueError for an empty one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("stop: expected strings of at least one character, found ''")
        self.done = False
        self._decode, self._stop = tokenizer.decode, tuple(stop)
        self._ids: list[int] = []   # the newest ids
        self._taken = 0             # characters of their text that have left for _pending
        self._silent = False        # whether the newest id has no text of its own
        self._waited = 0            # ids since the text last ended in a whole character
        self._pending = ""          # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Take one id; returns the text that may be shown now, often empty."""
        if self.done:
            return ""
        silent = not self._decode([token])
        if silent and self._silent:  # two in a row do what one does, and would fill the window
            return ""
        self._silent = silent
        self._ids.append(token)
        text = self._decode(self._ids)
        self._waited = self._waited + 1 if text.endswith(MISSING) else 0
        if self._waited == 0:
            new = text[self._taken:]
        elif self._waited > WAIT:
            new = text[self._taken:-1]  # only the last sign can still become a character
        else:
            new = ""  # byte-fallback decoders take a whole run of bytes back until it is right
        self._taken += len(new)
        if len(self._ids) > 2 * WINDOW:  # forget the older half; the end of the text stays, its beginning may not
            self._ids = self._ids[-WINDOW:]
            self._taken = len(self._decode(self._ids)) - (len(text) - self._taken)
        return self._show(new)

    def finish(self) -> str:
        """The rest: there will be no more ids."""
        if self.done:
            return ""
        text = self._show(self._decode(self._ids)[self._taken:])
        if not self.done:
            text += self._pending
        self._ids, self._taken, self._pending = [], 0, ""
        return text

    def _show(self, new: str) -> str:
        """What of the pending text and ``new`` can no longer become part of a stop string."""
        if not self._stop or not new:
            return new
        text = self._pending + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.done, self._pending = True, ""
            return text[:min(found)[1]]
        keep = max(n for stop in self._stop for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        self._pending = text[len(text) - keep:]
        return text[:len(text) - keep]
