"""Documents made from the code: `python -m controller.documents` prints docs/configuration.md."""

from __future__ import annotations

import sys

from common.options import OPTIONS, Option

HEAD = """\
# Configuration of a container

Keys of `config` in the API. All values are strings. This page is made from the table in `common/options.py` by
`python -m controller.documents > docs/configuration.md`; `GET /1.0/metadata/configuration` gives the same as JSON.

A key that is not here is refused, and so is a value that is not allowed, with the field's path and what is allowed.
*Live* says that a change applies to a running container at once; others apply at its next start.

| Key | Type | Default | Live | Meaning | Allowed |
|---|---|---|---|---|---|
"""


def configuration() -> str:
    """docs/configuration.md."""
    return HEAD + "".join(_row(option) for option in OPTIONS)


def _row(option: Option) -> str:
    default = f"`{option.default}`" if option.default else "none"
    live = "yes" if option.live else "no"
    cells = (f"`{option.key}`", option.type, default, live, option.description, option.allowed)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.stdout.write(configuration())
