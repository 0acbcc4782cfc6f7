"""What happened in a simulation, as lines and as one hash: two runs of a seed must have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable


class Trace:
    """Collects what happens. `show` gets each line, for a replay that somebody reads."""

    def __init__(self, time: Callable[[], float], show: Callable[[str], None] | None = None) -> None:
        self._time = time
        self._show = show
        self._hash = hashlib.sha256()

    def note(self, kind: str, text: str) -> None:
        """Something happened; `kind` is one of a fixed few."""
        line = f"{self._time():11.6f} {kind:10} {text}"
        self._hash.update(line.encode())
        if self._show is not None:
            self._show(line)

    @property
    def now(self) -> float:
        """The virtual time."""
        return self._time()

    @property
    def digest(self) -> str:
        """The hash of all lines so far."""
        return self._hash.hexdigest()
