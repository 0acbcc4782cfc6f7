"""Bearer tokens; only their hashes are kept."""

from controller.records import Token
from controller.store import models
from controller.store.rows import Rows

rows = Rows(models.tokens, Token, "id")
