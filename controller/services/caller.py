"""Who asks."""

from __future__ import annotations

from msgspec import Struct

from controller.records import Requestor


class Caller(Struct, frozen=True):
    """A known caller: the name and role of its token, how and from where it came, and the id of its request."""

    name: str
    role: str
    protocol: str
    address: str
    request: str

    @property
    def requestor(self) -> Requestor:
        """What an operation remembers of it."""
        return Requestor(self.name, self.protocol, self.address)
