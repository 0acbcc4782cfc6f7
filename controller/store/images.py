"""Images whose files the controller holds."""

from controller.records import Image
from controller.store import models
from controller.store.rows import Rows

rows = Rows(models.images, Image, "fingerprint")
