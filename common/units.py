"""Sizes and shares as the API writes them: `"5GB"`, `"20%"`, and as LXD's rule R27 reads them."""

from __future__ import annotations

import math
import re
from decimal import ROUND_HALF_UP, Decimal

from common.errors import InvalidRequest

SIZE_RULE = "a whole number with a unit: B, kB, MB, GB, TB, PB, EB (powers of 1000) or KiB, MiB, GiB, TiB, PiB, EiB"
_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_BINARY = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_FACTORS: dict[str, int] = {unit: 1000**power for power, unit in enumerate(_DECIMAL)}
_FACTORS.update({unit: 1024 ** (power + 1) for power, unit in enumerate(_BINARY)})
_FACTORS.update({"": 1, " bytes": 1})
_SIZE = re.compile(r"([0-9]{1,20})( bytes|[A-Za-z]{0,3})")
_PERCENT = re.compile(r"([0-9]{1,3})%")
MAX_SIZE = 2**63 - 1


def parse_size(text: str, field: str) -> int:
    """Bytes of `"512MiB"`, `"5GB"` or `"1024"`. Raises InvalidRequest naming `field`."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _FACTORS:
        raise InvalidRequest(f"invalid size {text[:80]!r}", field=field, allowed=SIZE_RULE)
    size = int(match[1]) * _FACTORS[match[2]]
    if size > MAX_SIZE:
        raise InvalidRequest(f"size {text!r} is too large", field=field, allowed=f"at most {MAX_SIZE} bytes")
    return size


def parse_percent(text: str, field: str) -> int | None:
    """The number of `"20%"` (1 to 100); None when `text` is no percentage at all."""
    match = _PERCENT.fullmatch(text)
    if match is None:
        return None
    share = int(match[1])
    if not 1 <= share <= 100:
        raise InvalidRequest(f"invalid share {text!r}", field=field, allowed="1% to 100%")
    return share


def _two_decimals(value: Decimal) -> str:
    text = format(value.quantize(Decimal("0.01"), rounding=ROUND_HALF_UP), "f")
    return text.rstrip("0").rstrip(".")


def format_size(size: int) -> str:
    """`5000000000` as `"5GB"`: decimal units, at most two decimals, no trailing zeros. Negative sizes are refused."""
    if size < 0:
        raise ValueError(f"negative size {size}")
    power = 0
    # Rounded first: 999,999 bytes are 1MB, not 1000kB.
    while power < len(_DECIMAL) - 1 and round(Decimal(size) / 1000**power, 2) >= 1000:
        power += 1
    return _two_decimals(Decimal(size) / 1000**power) + _DECIMAL[power]


def format_exactly(size: int) -> str:
    """A size in the largest unit in which it is a whole number: `67108864` as `"64MiB"`."""
    factor, unit = max((factor, unit) for unit, factor in _FACTORS.items() if unit.strip() and size % factor == 0)
    return f"{size // factor}{unit}" if size else "0B"


def format_percent(share: float) -> str:
    """A share of 1 as a percentage: `0.2` is `"20%"`; at most two decimals, no trailing zeros.

    Raises ValueError for a negative share and for what is no number.
    """
    if not 0 <= share < math.inf:
        raise ValueError(f"invalid share {share}")
    return _two_decimals(Decimal(repr(abs(share))) * 100) + "%"
