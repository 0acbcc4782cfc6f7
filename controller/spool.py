"""What the command line hands to the controller: files in its state directory, taken in by the controller alone.

A second process must not write to the database (libsqlite before 3.51.3 can corrupt its log then).
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from controller.records import Token
from controller.store.files import replace_file

log = logging.getLogger(__name__)
_SUFFIX = ".token"


class Spool:
    """The tokens that wait to be taken in, one file each, below the controller's `state` directory."""

    def __init__(self, state: Path) -> None:
        self._directory = state / "spool"

    def put(self, token: Token) -> None:
        """Hand over a token (its hash, never its text). Raises OSError."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        replace_file(self._directory / f"{token.id}{_SUFFIX}", msgspec.json.encode(token))

    def waiting(self) -> dict[Path, Token]:
        """The tokens that wait, by their files. What is no token is said and left alone."""
        if not self._directory.is_dir():
            return {}
        found: dict[Path, Token] = {}
        for file in sorted(self._directory.glob(f"[!.]*{_SUFFIX}")):
            try:
                found[file] = msgspec.json.decode(file.read_bytes(), type=Token)
            except (OSError, msgspec.DecodeError) as error:
                log.error("a token cannot be taken in", extra={"file": str(file), "reason": str(error)})
        return found
