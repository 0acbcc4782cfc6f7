"""What a fake container is as an image: an archive in LXD's unified format, of a few small files."""

from __future__ import annotations

import io
import tarfile


def fake_image(metadata: bytes, content: str) -> bytes:
    """A plain tar archive with metadata.yaml and a root file system that holds `content`."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("metadata.yaml", metadata), ("rootfs/etc/content", content.encode())):
            facts = tarfile.TarInfo(name)
            facts.size, facts.mode = len(data), 0o644
            archive.addfile(facts, io.BytesIO(data))
    return output.getvalue()
