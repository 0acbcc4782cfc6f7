"""Tar archives byte by byte, for what no tar program would write (POSIX ustar and pax, and GNU tar's own records)."""

from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess

BLOCK = 512
END = bytes(2 * BLOCK)
FILE, HARD, LINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
LONG_NAME, LONG_LINK, SPARSE, DUMP_DIRECTORY, CONTINUED, PAX, PAX_GLOBAL = b"L", b"K", b"S", b"D", b"M", b"x", b"g"


def _number(value: int | bytes, width: int) -> bytes:
    """A header's number: octal; bytes stand as they are."""
    return value if isinstance(value, bytes) else b"%0*o\0" % (width - 1, value)


def padded(content: bytes) -> bytes:
    """Content with zeros up to the next block."""
    return content + bytes(-len(content) % BLOCK)


def header(
    name: str | bytes,
    kind: bytes = FILE,
    *,
    size: int | bytes = 0,
    target: str | bytes = b"",
    mode: int | bytes = 0o755,
    owner: int | bytes = 0,
    group: int | bytes = 0,
    modified: int | bytes = 0,
    device: tuple[int, int] = (1, 3),
    tail: bytes = b"",
    magic: bytes = b"ustar\x0000",
) -> bytes:
    """One header. Numbers may be given as raw bytes of their field; `tail` is put over the last 167 bytes."""
    name = name.encode() if isinstance(name, str) else name
    target = target.encode() if isinstance(target, str) else target
    block = name[:100].ljust(100, b"\0") + _number(mode, 8) + _number(owner, 8) + _number(group, 8)
    block += _number(size, 12) + _number(modified, 12) + b" " * 8 + kind + target[:100].ljust(100, b"\0") + magic
    block += bytes(64) + b"%07o\0" % device[0] + b"%07o\0" % device[1]
    block = (block + tail).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: str | bytes, kind: bytes = FILE, content: bytes = b"", **fields: object) -> bytes:
    """A header with its content."""
    return header(name, kind, **{"size": len(content), **fields}) + padded(content)  # type: ignore[arg-type]


def records(values: dict[str, str | bytes]) -> bytes:
    """Records of a pax header: each line begins with its own length."""
    lines = []
    for key, value in values.items():
        text = b" " + key.encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
        length = len(text) + 1
        while length != len(b"%d" % length) + len(text):
            length += 1
        lines.append(b"%d" % length + text)
    return b"".join(lines)


def pax(values: dict[str, str | bytes], kind: bytes = PAX) -> bytes:
    """A pax header with these records, for the member after it or (PAX_GLOBAL) for all after it."""
    return member("PaxHeaders/x", kind, records(values))


def base256(value: int, width: int) -> bytes:
    """GNU tar's way to write what octal cannot: two's complement after a mark."""
    raw = bytearray((value & ((1 << (8 * width)) - 1)).to_bytes(width, "big"))
    raw[0] |= 0x80
    return bytes(raw)


def gnu(name: str | bytes, kind: bytes = FILE, content: bytes = b"", **fields: object) -> bytes:
    """A member in GNU tar's old format, whose own kinds are taken for what they are."""
    return member(name, kind, content, magic=b"ustar  \0", **fields)


def zstd(content: bytes) -> bytes:
    """Compressed by the zstd program: Python has none."""
    return subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True).stdout


def gz(content: bytes) -> bytes:
    """Compressed, with no time stamp in it."""
    return gzip.compress(content, mtime=0)


def xz(content: bytes) -> bytes:
    """Compressed with a small dictionary, which is quick to make."""
    return lzma.compress(content, preset=0)


def bz(content: bytes) -> bytes:
    """Compressed; streams of it, as of gzip, xz and zstd, can follow one another."""
    return bz2.compress(content)
