"""Images whose files the controller holds."""

from datetime import datetime, timedelta

import msgspec

from controller.records import Image
from controller.store import models
from controller.store.db import Transaction
from controller.store.rows import Rows

rows = Rows(models.images, Image, "fingerprint", compared=True)
USE_NOTED_EVERY = timedelta(hours=1)


def note_use(transaction: Transaction, fingerprint: str | None, at: str) -> None:
    """A container was made from an image at a time; what is noted of that is at most an hour old."""
    image = rows.get(transaction.connection, fingerprint) if fingerprint else None
    if image is None:
        return
    last = image.last_used_at
    if last is None or datetime.fromisoformat(at) - datetime.fromisoformat(last) >= USE_NOTED_EVERY:
        rows.replace(transaction, msgspec.structs.replace(image, last_used_at=at))
