"""Images: import of a unified and of a bare tarball, list, show by prefix, creation from them, delete."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.api import TIME, make, name, nothing_happens
from tests.helpers.cluster import BUSYBOX, Cluster, cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")
BYTES = {"Content-Type": "application/octet-stream"}


def tarball(directory: Path, layout: str, release: str) -> bytes:
    """An image as LXD exports it (`unified`), or just a root file system (`rootfs`), made by the system's tar."""
    root = directory / "rootfs" if layout == "unified" else directory
    for part in ("bin", "etc", "sbin", "dev", "proc"):
        (root / part).mkdir(parents=True)
    (root / "etc" / "os-release").write_text(f"ID=tiny\nVERSION_ID={release}\n")
    (root / "sbin" / "init").write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 57)
    if layout == "unified":
        facts = f"architecture: x86_64\ncreation_date: 1700000000\nproperties:\n  os: tiny\n  release: '{release}'\n"
        (directory / "metadata.yaml").write_text(facts)
    made = subprocess.run(["tar", "-C", str(directory), "-cf", "-", "."], capture_output=True, check=True, timeout=20)
    return made.stdout


async def upload(fleet: Cluster, content: bytes, query: str = "") -> dict[str, Any]:
    return await fleet.operation("POST", f"/1.0/images{query}", None, content=content, headers=BYTES)


@pytest.mark.parametrize("layout", ["unified", "rootfs"])
async def test_import_list_show_use_delete(fleet: Cluster, tmp_path: Path, layout: str) -> None:
    release, alias = name("release"), name("alias")
    content = tarball(tmp_path, layout, release)
    operation = await upload(fleet, content, f"?alias={alias}")
    assert operation["status"] == "Success", operation
    fingerprint = hashlib.sha256(content).hexdigest()
    assert operation["metadata"]["fingerprint"] == fingerprint
    assert f"/1.0/images/{fingerprint}" in (await fleet.call("GET", "/1.0/images"))["metadata"]
    shown = (await fleet.call("GET", f"/1.0/images/{fingerprint}"))["metadata"]
    assert (shown["fingerprint"], shown["layout"], shown["size"]) == (fingerprint, layout, len(content))
    assert shown["aliases"] == [{"name": alias, "description": ""}] and TIME.fullmatch(shown["created_at"])
    assert (await fleet.call("GET", f"/1.0/images/{fingerprint[:8]}"))["metadata"] == shown
    assert shown in (await fleet.call("GET", "/1.0/images?recursion=1"))["metadata"]
    sources: list[dict[str, Any]] = [{"alias": alias}, {"fingerprint": fingerprint[:12]}]
    if layout == "unified":
        assert shown["properties"]["os"] == "tiny" and shown["architecture"] == "x86_64"
        sources.append({"properties": {"os": "tiny", "release": release, "architecture": "amd64"}})
    for source in sources:
        container = await make(fleet, source={"type": "image", **source})
        asked = source.get("properties", source)
        assert (await fleet.show(container))["image"] == {**asked, "fingerprint": fingerprint}
    await fleet.done("DELETE", f"/1.0/images/{fingerprint}")
    await fleet.refused("GET", f"/1.0/images/{fingerprint}", None, 404)
    # What was made from it stays.
    assert (await fleet.show(container))["status"]["status"] == "Stopped"
    await fleet.refused("POST", f"/1.0/vz/{name()}", {"source": {"type": "image", "alias": alias}}, 404)


async def test_the_built_image_is_listed_and_shared(fleet: Cluster) -> None:
    one, other = await make(fleet, source=BUSYBOX, node="node1"), await make(fleet, source=BUSYBOX, node="node2")
    fingerprints = {(await fleet.show(each))["image"]["fingerprint"] for each in (one, other)}
    [fingerprint] = fingerprints
    shown = (await fleet.call("GET", f"/1.0/images/{fingerprint}"))["metadata"]
    assert shown["properties"]["os"] == "busybox" and shown["size"] > 0


async def test_the_same_file_twice_is_one_image(fleet: Cluster, tmp_path: Path) -> None:
    content = tarball(tmp_path, "unified", name("release"))
    one, other = name("alias"), name("alias")
    for alias in (one, other):
        assert (await upload(fleet, content, f"?alias={alias}"))["status"] == "Success"
    shown = (await fleet.call("GET", f"/1.0/images/{hashlib.sha256(content).hexdigest()}"))["metadata"]
    assert [each["name"] for each in shown["aliases"]] == [one, other]


async def test_what_is_no_image_fails_and_is_not_kept(fleet: Cluster) -> None:
    before = (await fleet.call("GET", "/1.0/images"))["metadata"]
    operation = await upload(fleet, b"this is no tarball" * 1000)
    assert operation["status"] == "Failure" and operation["err"] and operation["err_code"] == "invalid"
    assert (await fleet.call("GET", "/1.0/images"))["metadata"] == before
    assert [file.name for file in (fleet.settings.state / "images" / "incoming").iterdir()] == []


async def test_uploads_that_are_refused(fleet: Cluster, tmp_path: Path) -> None:
    alias = name("alias")
    content = tarball(tmp_path, "unified", name("release"))
    assert (await upload(fleet, content, f"?alias={alias}"))["status"] == "Success"
    async with nothing_happens(fleet):
        for query, headers, code, field, given in (
            ("", BYTES, 400, "body", b""),
            ("", {"Content-Type": "application/json"}, 400, "source", b"{}"),
            ("", {"Content-Type": "text/plain"}, 400, "Content-Type", b"x" * 3_000_000),
            ("?alias=a%20b", BYTES, 400, "alias", b"x" * 3_000_000),
            (f"?alias={alias}", BYTES, 409, "alias", content),
            ("?colour=red", BYTES, 400, "colour", content),
        ):
            answer = await fleet.refused("POST", f"/1.0/images{query}", None, code, content=given, headers=headers)
            assert answer["metadata"]["field"] == field
        stranger = {**BYTES, "Authorization": ""}
        await fleet.refused("POST", "/1.0/images", None, 401, content=b"x" * 3_000_000, headers=stranger)


async def test_a_prefix_of_several_or_none(fleet: Cluster) -> None:
    answer = await fleet.refused("GET", "/1.0/images/zzz", None, 404)
    assert answer["metadata"]["field"] == "fingerprint"


async def test_the_files_for_nodes_need_a_token_of_their_operation(fleet: Cluster) -> None:
    fingerprint = (await fleet.show(await make(fleet, source=BUSYBOX)))["image"]["fingerprint"]
    # Not even an administrator's token opens them.
    for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer x.y"}):
        await fleet.refused("GET", f"/1.0/internal/images/{fingerprint}", None, 403, headers=headers)
    for headers in ({}, {"Authorization": ""}):
        response = await fleet.request("GET", "/1.0/internal/transfers/" + "0" * 36, headers=headers)
        assert response.status_code in (401, 403, 404)


async def test_an_image_over_the_limit_is_413(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=0, max_upload=1_000_000) as fleet:

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b"x" * 65536

        for content in (b"x" * 1_000_001, b"x" * 5_000_000, pieces()):
            answer = await fleet.refused("POST", "/1.0/images", None, 413, content=content, headers=BYTES)
            assert answer["metadata"]["code"] == "too-large" and "1000000" in answer["metadata"]["allowed"]
        assert list((fleet.settings.state / "images").rglob("image-*")) == []
