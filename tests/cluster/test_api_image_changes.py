"""Aliases, what can be written of an image, what anyone may see of it, and its file as it goes out."""

from __future__ import annotations

import asyncio
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from controller.store import events as event_rows
from tests.cluster.test_api_images import tarball, upload
from tests.helpers.api import TIME, make, name, nothing_happens
from tests.helpers.cluster import Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
ALIASES = "/1.0/images/aliases"
ANYONE: dict[str, Any] = {"headers": {"Authorization": ""}}
LATER = "2100-01-01T00:00:00.000000Z"
NEVER = "0001-01-01T00:00:00Z"


async def image(fleet: Cluster, directory: Path, query: str = "") -> str:
    """A new image; its fingerprint."""
    release = name("release")
    operation = await upload(fleet, tarball(directory / release, "unified", release), query)
    assert operation["status"] == "Success", operation
    return str(operation["metadata"]["fingerprint"])


async def shown(fleet: Cluster, fingerprint: str, **options: Any) -> dict[str, Any]:
    answer: dict[str, Any] = (await fleet.call("GET", f"/1.0/images/{fingerprint}", **options))["metadata"]
    return answer


async def told(fleet: Cluster, since: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Action, source and context of what was told of images after an event."""
    page = await fleet.app.store.read(lambda connection: event_rows.page(connection, since, 100))
    return [(event.action, event.source, event.body["context"]) for event in page if event.action.startswith("image-")]


# ------------------------------------------------------------ aliases


@pytest.mark.parametrize("slash", ["/", "%2F"])
async def test_an_alias_from_its_creation_to_its_end(fleet: Cluster, tmp_path: Path, slash: str) -> None:
    one, other = await image(fleet, tmp_path), await image(fleet, tmp_path)
    alias, prefix = f"ubuntu/{name('a')}", one[:12]
    response = await fleet.request("POST", ALIASES, {"name": alias, "target": prefix, "description": "", "type": ""})
    url = f"{ALIASES}/{quote(alias, safe='')}"
    assert response.status_code == 201 and response.headers["Location"] == url
    path = f"{ALIASES}/{alias.replace('/', slash)}"
    expected = {"name": alias, "target": one, "description": "", "type": "container"}
    assert (await fleet.call("GET", path))["metadata"] == expected
    assert expected in (await fleet.call("GET", f"{ALIASES}?recursion=1"))["metadata"]
    assert url in (await fleet.call("GET", ALIASES))["metadata"]

    await fleet.call("PUT", path, {"target": other, "description": "the other"})
    moved = {**expected, "target": other, "description": "the other"}
    assert (await fleet.call("GET", path))["metadata"] == moved
    assert (await shown(fleet, one))["aliases"] == []
    assert (await shown(fleet, other))["aliases"] == [{"name": alias, "description": "the other"}]
    container = await make(fleet, source={"type": "image", "alias": alias})
    assert (await fleet.show(container))["image"]["fingerprint"] == other

    await fleet.call("PATCH", path, {"description": "patched"})
    assert (await fleet.call("GET", path))["metadata"] == {**moved, "description": "patched"}
    await fleet.call("PUT", path, {"target": other})
    assert (await fleet.call("GET", path))["metadata"]["description"] == ""

    new = f"{alias}/new"
    response = await fleet.request("POST", path, {"name": new})
    assert response.status_code == 201 and response.headers["Location"] == f"{ALIASES}/{quote(new, safe='')}"
    await fleet.refused("GET", path, None, 404)
    path += f"{slash}new"
    assert (await fleet.call("GET", path))["metadata"] == {**expected, "name": new, "target": other}
    await fleet.call("DELETE", path)
    for method in ("GET", "DELETE"):
        answer = await fleet.refused(method, path, None, 404)
        assert answer["error"] == "Image alias not found"
    assert (await shown(fleet, other))["aliases"] == []


async def test_what_was_read_goes_back_and_an_older_revision_is_412(fleet: Cluster, tmp_path: Path) -> None:
    fingerprint, alias = await image(fleet, tmp_path), name("alias")
    path = f"{ALIASES}/{alias}"
    await fleet.call("POST", ALIASES, {"name": alias, "target": fingerprint, "description": "first"})
    response = await fleet.request("GET", path)
    tag, body = {"If-Match": response.headers["ETag"]}, response.json()["metadata"]
    await fleet.call("PUT", path, body, headers=tag)
    await fleet.call("PUT", path, {**body, "description": "second"}, headers=tag)
    await fleet.refused("PUT", path, body, 412, headers=tag)
    assert (await fleet.call("GET", path))["metadata"]["description"] == "second"


async def test_the_events_of_aliases(fleet: Cluster, tmp_path: Path) -> None:
    one, other = await image(fleet, tmp_path), await image(fleet, tmp_path)
    alias, since = name("a/b"), fleet.app.events.latest
    await fleet.call("POST", ALIASES, {"name": alias, "target": one})
    await fleet.call("PUT", f"{ALIASES}/{alias}", {"target": other})
    await fleet.call("PATCH", f"{ALIASES}/{alias}", {"description": "same target"})
    await fleet.call("PATCH", f"{ALIASES}/{alias}", {"description": "same target"})
    await fleet.call("POST", f"{ALIASES}/{alias}", {"name": f"{alias}2"})
    await fleet.call("DELETE", f"{ALIASES}/{alias}2")
    url = f"{ALIASES}/{quote(alias, safe='')}"
    assert await told(fleet, since) == [
        ("image-alias-created", url, {"target": one}),
        ("image-alias-updated", url, {"target": other}),
        ("image-alias-updated", url, {"target": other}),
        ("image-alias-renamed", f"{url}2", {"old_name": alias, "target": other}),
        ("image-alias-deleted", f"{url}2", {"target": other}),
    ]


async def test_aliases_that_are_refused(fleet: Cluster, tmp_path: Path) -> None:
    fingerprint, taken = await image(fleet, tmp_path), name("taken")
    await fleet.call("POST", ALIASES, {"name": taken, "target": fingerprint})
    free, path = name("free"), f"{ALIASES}/{taken}"
    async with nothing_happens(fleet):
        for method, url, body, code, field in (
            ("POST", ALIASES, {"name": taken, "target": fingerprint}, 409, "name"),
            ("POST", ALIASES, {"name": free, "target": "f" * 64}, 404, "target"),
            ("POST", ALIASES, {"name": free, "target": "a" * 65}, 400, "target"),
            ("POST", ALIASES, {"name": free, "target": ""}, 404, "target"),
            ("POST", ALIASES, {"name": free}, 400, "target"),
            ("POST", ALIASES, {"target": fingerprint}, 400, "name"),
            ("POST", ALIASES, {"name": free, "target": fingerprint, "type": "virtual-machine"}, 400, "type"),
            ("POST", ALIASES, {"name": free, "target": fingerprint, "colour": 1}, 400, "colour"),
            ("POST", ALIASES, {"name": free, "target": fingerprint, "description": "a\nb"}, 400, "description"),
            *(
                ("POST", ALIASES, {"name": bad, "target": fingerprint}, 400, "name")
                for bad in ("", "-x", "/x", "a b", "a\x00b", "ü", "a\nb", "x" * 129)
            ),
            ("PUT", path, {"description": "no target"}, 400, "target"),
            ("PUT", path, {"target": fingerprint, "name": "another"}, 400, "name"),
            ("PUT", path, {"target": fingerprint, "type": ["container"]}, 400, "type"),
            ("PUT", path, {"target": "f" * 64}, 404, "target"),
            ("PATCH", path, {"target": None}, 400, "target"),
            ("PATCH", path, {"description": "\u202e"}, 400, "description"),
            ("POST", path, {"name": taken}, 409, "name"),
            ("POST", path, {"name": "-x"}, 400, "name"),
            ("POST", path, {}, 400, "name"),
            ("PUT", f"{path}x", {"target": fingerprint}, 404, "name"),
            ("PATCH", f"{path}x", {"description": ""}, 404, "name"),
            ("POST", f"{path}x", {"name": free}, 404, "name"),
        ):
            answer = await fleet.refused(method, url, body, code)
            assert answer["metadata"]["field"] == field, (method, url, body, answer)
    for strange in ("%00", "%ff", "..%2f..%2fetc", "a%0d%0ab", "%2f", "x" * 3000, "*", "export", "?recursion=1"):
        response = await fleet.request("GET", f"{ALIASES}/{strange}")
        assert response.status_code in (400, 404), (strange, response.text)
    [present] = (await shown(fleet, fingerprint))["aliases"]
    assert present == {"name": taken, "description": ""}


async def test_an_alias_written_twice_at_once_has_one_image(fleet: Cluster, tmp_path: Path) -> None:
    prints = [await image(fleet, tmp_path), await image(fleet, tmp_path)]
    alias = name("raced")
    answers = await asyncio.gather(
        *(fleet.request("POST", ALIASES, {"name": alias, "target": target}) for target in prints * 3)
    )
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 5
    holders = [target for target in prints if (await shown(fleet, target))["aliases"]]
    assert len(holders) == 1


# ------------------------------------------------------------ what can be written


async def test_an_image_is_changed_and_what_was_read_goes_back(fleet: Cluster, tmp_path: Path) -> None:
    fingerprint = await image(fleet, tmp_path)
    path, since = f"/1.0/images/{fingerprint}", fleet.app.events.latest
    response = await fleet.request("GET", path)
    before, tag = response.json()["metadata"], {"If-Match": response.headers["ETag"]}
    assert (before["public"], before["auto_update"], before["cached"]) == (False, False, False)
    assert before["expires_at"] is before["last_used_at"] is before["update_source"] is None
    assert TIME.fullmatch(before["uploaded_at"])
    await fleet.call("PUT", path, before, headers=tag)
    assert await shown(fleet, fingerprint) == before and await told(fleet, since) == []

    written = {"properties": {"os": "Tiny", "mine": "yes"}, "public": True, "expires_at": LATER}
    await fleet.call("PUT", path, {**before, **written}, headers=tag)
    assert await shown(fleet, fingerprint) == {**before, **written, "architecture": None}
    assert await told(fleet, since) == [("image-updated", path, {})]
    answer = await fleet.refused("PUT", path, before, 412, headers=tag)
    assert answer["metadata"]["field"] == "If-Match"

    await fleet.call("PATCH", f"/1.0/images/{fingerprint[:16]}", {"properties": {"mine": None, "own": "1"}})
    assert (await shown(fleet, fingerprint))["properties"] == {"os": "Tiny", "own": "1"}
    await fleet.call("PATCH", path, {"public": False, "expires_at": NEVER})
    after = await shown(fleet, fingerprint)
    assert (after["public"], after["expires_at"], after["properties"]["own"]) == (False, None, "1")
    await fleet.call("PUT", path, {"properties": {"release": after["fingerprint"]}})
    found = {"type": "image", "properties": {"release": fingerprint}}
    container = await make(fleet, source=found)
    assert (await fleet.show(container))["image"]["fingerprint"] == fingerprint
    await until(lambda: fleet.app.fleet.images[fingerprint].last_used_at, "its use is noted")
    assert TIME.fullmatch((await shown(fleet, fingerprint))["last_used_at"])


async def test_changes_that_are_refused(fleet: Cluster, tmp_path: Path) -> None:
    fingerprint = await image(fleet, tmp_path)
    path = f"/1.0/images/{fingerprint}"
    before = await shown(fleet, fingerprint)
    async with nothing_happens(fleet):
        for body, field in (
            ({"public": "yes"}, "public"),
            ({"public": None}, "public"),
            ({"auto_update": True}, "auto_update"),
            ({"expires_at": "tomorrow"}, "expires_at"),
            ({"expires_at": "2100-01-01T00:00:00"}, "expires_at"),
            ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
            ({"expires_at": "0500-01-01T00:00:00Z"}, "expires_at"),
            ({"expires_at": "9999-12-31T23:59:59-10:00"}, "expires_at"),
            ({"properties": {"a b": "x"}}, "properties"),
            ({"properties": {"": "x"}}, "properties"),
            ({"properties": {"x": "a\nb"}}, "properties.x"),
            ({"properties": {"x": "\u202e"}}, "properties.x"),
            ({"properties": {"x": "y" * 1025}}, "properties.x"),
            ({"properties": {"x": 1}}, "properties.x"),
            ({"properties": {f"p{number}": "" for number in range(65)}}, "properties"),
            ({"properties": []}, "properties"),
            ({"colour": "red"}, "colour"),
        ):
            for method, whole in (("PATCH", body), ("PUT", {"properties": {}, **body})):
                answer = await fleet.refused(method, path, whole, 400)
                assert answer["metadata"]["field"] == field, (method, body, answer)
        answer = await fleet.refused("PUT", path, {"public": True}, 400)
        assert answer["metadata"]["field"] == "properties"
        await fleet.refused("PUT", f"/1.0/images/{'f' * 64}", {"properties": {}}, 404)
        await fleet.refused("PATCH", f"/1.0/images/{'f' * 64}", {}, 404)
        await fleet.refused("PATCH", path, {"properties": {"x": "y"}}, 412, headers={"If-Match": '"other"'})
    assert await shown(fleet, fingerprint) == before


async def test_the_list_by_alias(fleet: Cluster, tmp_path: Path) -> None:
    one, other = name("alias"), name("alias")
    fingerprint = await image(fleet, tmp_path, f"?alias={one}")
    second = await image(fleet, tmp_path, f"?alias={other}")
    assert (await fleet.call("GET", f"/1.0/images?alias={one}"))["metadata"] == [f"/1.0/images/{fingerprint}"]
    both = (await fleet.call("GET", f"/1.0/images?alias={one}&alias={other}&recursion=1&filter="))["metadata"]
    assert {each["fingerprint"] for each in both} == {fingerprint, second}
    assert (await fleet.call("GET", "/1.0/images?alias=none"))["metadata"] == []


# ------------------------------------------------------------ what anyone may see


async def test_anyone_sees_public_images_and_no_others(fleet: Cluster, tmp_path: Path) -> None:
    public, private = await image(fleet, tmp_path), await image(fleet, tmp_path)
    await fleet.call("PATCH", f"/1.0/images/{public}", {"public": True})
    urls = (await fleet.call("GET", "/1.0/images", **ANYONE))["metadata"]
    assert f"/1.0/images/{public}" in urls and f"/1.0/images/{private}" not in urls
    objects = (await fleet.call("GET", "/1.0/images?recursion=1", **ANYONE))["metadata"]
    assert all(each["public"] for each in objects) and public in {each["fingerprint"] for each in objects}
    assert await shown(fleet, public[:12], **ANYONE) == await shown(fleet, public)
    assert (await fleet.request("GET", f"/1.0/images/{public}/export", **ANYONE)).status_code == 200
    none = (await fleet.refused("GET", f"/1.0/images/{'e' * 64}", None, 404, **ANYONE))["metadata"]
    for path in (f"/1.0/images/{private}", f"/1.0/images/{private[:12]}", f"/1.0/images/{private}/export"):
        assert (await fleet.refused("GET", path, None, 404, **ANYONE))["metadata"] == none
    for path in ("/1.0/images", f"/1.0/images/{public}", f"/1.0/images/{public}/export"):
        for wrong in ("Bearer wrong", "Basic eDp5", "Bearer"):
            await fleet.refused("GET", path, None, 401, headers={"Authorization": wrong})
    for method, path in (
        ("PUT", f"/1.0/images/{public}"),
        ("PATCH", f"/1.0/images/{public}"),
        ("DELETE", f"/1.0/images/{public}"),
        ("GET", ALIASES),
        ("POST", "/1.0/images"),
    ):
        await fleet.refused(method, path, None, 401, **ANYONE)


# ------------------------------------------------------------ export


def packed(directory: Path, what: str = ".") -> bytes:
    """A tar archive of what is in a directory."""
    made = subprocess.run(["tar", "-C", str(directory), "-cf", "-", what], capture_output=True, check=True, timeout=20)
    return made.stdout


def large(directory: Path) -> bytes:
    """An image that fits no buffer between here and there."""
    tarball(directory, "unified", name("release"))
    (directory / "rootfs" / "large").write_bytes(b"\x5a" * 30_000_000)
    return packed(directory)


async def test_the_file_goes_out_whole_and_in_ranges(fleet: Cluster, tmp_path: Path) -> None:
    release = name("release")
    content = tarball(tmp_path, "unified", release)
    path = f"/1.0/images/{(await upload(fleet, content))['metadata']['fingerprint']}/export"
    response = await fleet.request("GET", path)
    assert response.status_code == 200 and response.content == content
    assert response.headers["Content-Length"] == str(len(content))
    assert re.fullmatch(r'attachment; filename="[A-Za-z0-9._-]+"', response.headers["Content-Disposition"])
    size = len(content)
    for asked, start, end in (
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=5-{size * 9}", 5, size),
        (f"bytes=-{size * 9}", 0, size),
    ):
        response = await fleet.request("GET", path, headers={"Range": asked})
        assert response.status_code == 206 and response.content == content[start:end], asked
        assert response.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
    for asked in (f"bytes={size}-", "bytes=-0", f"bytes={10**17}-"):
        response = await fleet.request("GET", path, headers={"Range": asked})
        assert response.status_code == 416 and response.headers["Content-Range"] == f"bytes */{size}"
    for asked in ("bytes=9-3", "bytes=0-1,5-6", "lines=1-2", "bytes=x-", "bytes=-", "bytes=" + "9" * 400 + "-"):
        response = await fleet.request("GET", path, headers={"Range": asked})
        assert response.status_code == 200 and response.content == content, asked


async def test_a_split_image_goes_out_in_two_parts_that_come_in_again(fleet: Cluster, tmp_path: Path) -> None:
    (tmp_path / "metadata.yaml").write_text(
        f"architecture: x86_64\ncreation_date: 1\nproperties: {{os: {name('os')}}}\n"
    )
    metadata = packed(tmp_path, "metadata.yaml")
    root = tarball(tmp_path / "root", "rootfs", "1")
    files = {"metadata": ("meta.tar", metadata), "rootfs": ('evil"\r\nX-Bad: 1/../root.tar', root)}
    operation = await fleet.done("POST", "/1.0/images", files=files)
    fingerprint = operation["metadata"]["fingerprint"]
    assert fingerprint == hashlib.sha256(metadata + root).hexdigest()
    response = await fleet.request("GET", f"/1.0/images/{fingerprint}/export", headers={"Range": "bytes=0-9"})
    assert response.status_code == 200 and "X-Bad" not in response.headers
    kind = response.headers["Content-Type"]
    assert kind.startswith("multipart/form-data; boundary=")
    assert metadata in response.content and root in response.content
    assert response.content.count(b"Content-Disposition: form-data; name=") == 2
    await fleet.done("DELETE", f"/1.0/images/{fingerprint}")
    again = await fleet.done("POST", "/1.0/images", content=response.content, headers={"Content-Type": kind})
    assert again["metadata"]["fingerprint"] == fingerprint


async def test_an_export_of_what_is_not_there(fleet: Cluster, tmp_path: Path) -> None:
    await fleet.refused("GET", f"/1.0/images/{'f' * 64}/export", None, 404)
    await fleet.refused("GET", "/1.0/images/%00/export", None, 404)
    fingerprint = await image(fleet, tmp_path)
    (fleet.settings.state / "images" / fingerprint).unlink()
    await fleet.refused("GET", f"/1.0/images/{fingerprint}/export", None, 404)


async def test_an_export_goes_on_when_its_image_is_deleted(fleet: Cluster, tmp_path: Path) -> None:
    content = large(tmp_path)
    fingerprint = (await upload(fleet, content))["metadata"]["fingerprint"]
    async with fleet.client.stream("GET", f"/1.0/images/{fingerprint}/export") as response:
        pieces = response.aiter_bytes()
        first = await anext(pieces)
        await fleet.done("DELETE", f"/1.0/images/{fingerprint}")
        rest = b"".join([piece async for piece in pieces])
    assert first + rest == content


async def test_who_takes_nothing_is_not_waited_for(
    fleet: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.api.image_export.PATIENCE", 0.3)
    content = large(tmp_path)
    fingerprint = (await upload(fleet, content))["metadata"]["fingerprint"]

    def is_open() -> bool:
        files = [file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        return fleet.settings.state / "images" / fingerprint in files

    async with fleet.client.stream("GET", f"/1.0/images/{fingerprint}/export") as response:
        await until(lambda: not is_open(), "the file is closed")
        with pytest.raises(httpx.RemoteProtocolError):
            await response.aread()
