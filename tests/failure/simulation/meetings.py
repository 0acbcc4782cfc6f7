"""Where the two ends of a way between nodes find each other."""

from __future__ import annotations

import random
from typing import Any

APART = 0.2
"""How probably two nodes cannot reach each other directly."""


class Meetings:
    """Which ends are there now, by token and by whether they send; and which nodes are apart."""

    def __init__(self, seed: int) -> None:
        self.ends: dict[tuple[str, bool], Any] = {}
        self._seed = seed

    def apart(self, one: str, other: str) -> bool:
        """Whether two nodes cannot reach each other directly, in this world."""
        pair = "/".join(sorted((one, other)))
        return random.Random(f"{self._seed}/apart/{pair}").random() < APART
