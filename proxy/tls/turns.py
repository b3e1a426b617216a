"""How much of a connection is read at a time, and when it has to let others go first. No I/O; time is an argument.

Each turn of the event loop reads once from every connection that has sent something. Bytes differ in what they cost by
a factor of fifty, so that a client could make its turns long and those of the others rare. Therefore:

- A connection is read a little at a time while its bytes are dear.
- Who has had most of the time lately, while others had work too, pauses for as long as it has had. Those that work
  side by side and need much each don't: pauses would gain nobody anything.
"""

from __future__ import annotations

SIZES = (2_048, 8_192, 32_768, 131_072)
_FIRST = 3
_LARGEST = len(SIZES) - 1
DEAR_SECONDS = 0.002  # for one read: then the next one is smaller
CHEAP_SECONDS = 0.001
WINDOW_SECONDS = 0.010
MOST_SECONDS = 0.0025  # of a window, or at once
_MORE_THAN_OTHERS = 1.5


class Turns:
    """Of one connection. `size` is the index of its next read's size in SIZES.

    `suspect`: the last read took long, or the processor was busy with other programs meanwhile. The next one should be
    measured in the processor's time instead of the clock's.
    """

    __slots__ = ("_others", "_reads", "_since", "_used", "_worked", "size", "suspect")

    def __init__(self, reads: int) -> None:
        """reads: how many there were of all connections so far."""
        self._worked = 0.0
        self.size = _FIRST
        self.suspect = False
        self._since = float("-inf")
        self._used = 0.0
        self._reads = reads
        self._others = False

    def note(self, spent: float, now: float, full: bool, reads: int, worked: float) -> float:
        """A read was worked on for so many seconds -> for how many the connection should not be read, 0 for none.

        full: it was as large as it could be. reads: how many there were of all connections, this one included; worked:
        for how many seconds those were worked on that took long enough to be measured.
        """
        certain = self.suspect or spent <= DEAR_SECONDS
        self.suspect = spent > DEAR_SECONDS
        if self.suspect:
            self.size = max(self.size - 1, 0)
        elif full and spent < CHEAP_SECONDS:
            self.size = min(self.size + 1, _LARGEST)
        if now - self._since > WINDOW_SECONDS:
            self._begin(now - spent, worked - spent)
        if reads - self._reads > 1:
            self._others = True
        self._reads = reads
        if not certain:
            return 0.0
        self._used += spent
        if self._used < MOST_SECONDS:
            return 0.0
        others = worked - self._worked - self._used
        pause = self._used if self._others and self._used > _MORE_THAN_OTHERS * others else 0.0
        self._begin(now, worked)
        return pause

    def ends_turn(self, full: bool, times: int) -> bool:
        """Whether others are to be looked at before this one is read again, after so many full reads."""
        return full and (times > 1 or self.size < _LARGEST)

    def _begin(self, now: float, worked: float) -> None:
        self._since = now
        self._worked = worked
        self._used = 0.0
        self._others = False
