"""GET /1.0/vz: recursion, filters, pages, and the ETag of the list."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.api import make, name
from tests.helpers.cluster import Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def listed(fleet: Cluster, query: str = "") -> list[Any]:
    found: list[Any] = (await fleet.call("GET", f"/1.0/vz{query}"))["metadata"]
    return found


async def test_a_list_of_urls_sorted_by_id(fleet: Cluster) -> None:
    made = {f"/1.0/vz/{await make(fleet)}" for _ in range(3)}
    for query in ("", "?recursion=0", "?recursion=many"):
        urls = await listed(fleet, query)
        assert made <= set(urls) and urls == sorted(urls)


async def test_a_list_of_whole_objects(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    for query in ("?recursion=1", "?recursion=2"):
        objects = await listed(fleet, query)
        assert [each["id"] for each in objects] == [url.rpartition("/")[2] for url in await listed(fleet)]
        found = next(each for each in objects if each["id"] == container)
        shown = await fleet.show(container)
        assert found.keys() == shown.keys() and found["status"]["status"] == "Running"
        assert found["status"]["machine"][0]["ip_address"] == shown["status"]["machine"][0]["ip_address"]


async def test_filters(fleet: Cluster) -> None:
    hostname = name("host")
    stopped = await make(fleet, hostname=hostname, node="node1")
    running = await make(fleet, hostname=hostname, node="node2", start=True)
    both = {f"/1.0/vz/{stopped}", f"/1.0/vz/{running}"}

    async def among(query: str) -> set[str]:
        return both & set(await listed(fleet, query))

    assert set(await listed(fleet, f"?hostname={hostname}")) == both
    assert await among("?node=node1") == {f"/1.0/vz/{stopped}"}
    assert await among("?status=Running") == await among("?status=running") == {f"/1.0/vz/{running}"}
    assert await listed(fleet, f"?hostname={hostname}&status=stopped&node=node1") == [f"/1.0/vz/{stopped}"]
    assert await listed(fleet, f"?hostname={hostname}&status=stopped&node=node2") == []
    assert [each["id"] for each in await listed(fleet, f"?hostname={hostname}&node=node2&recursion=1")] == [running]
    assert await listed(fleet, f"?hostname={hostname[:-1]}") == []


async def test_pages(fleet: Cluster) -> None:
    hostname = name("page")
    made = sorted([await make(fleet, hostname=hostname) for _ in range(5)])
    found: list[str] = []
    cursor, pages = "", 0
    while True:
        response = await fleet.request("GET", f"/1.0/vz?hostname={hostname}&limit=2{cursor}")
        found += [url.rpartition("/")[2] for url in response.json()["metadata"]]
        pages += 1
        if "X-Next-Cursor" not in response.headers:
            break
        cursor = f"&cursor={response.headers['X-Next-Cursor']}"
    assert found == made and pages == 3


async def test_a_cursor_is_good_when_its_container_is_gone(fleet: Cluster) -> None:
    hostname = name("gone")
    made = sorted([await make(fleet, hostname=hostname) for _ in range(3)])
    await fleet.done("DELETE", f"/1.0/vz/{made[0]}")
    urls = await listed(fleet, f"?hostname={hostname}&cursor={made[0]}")
    assert urls == [f"/1.0/vz/{container}" for container in made[1:]]


async def test_a_list_that_did_not_change_is_304(fleet: Cluster) -> None:
    await make(fleet)

    async def unchanged() -> bool:
        response = await fleet.request("GET", "/1.0/vz?recursion=1")
        tag = response.headers["ETag"]
        assert response.status_code == 200 and tag.startswith('"')
        again = await fleet.request("GET", "/1.0/vz?recursion=1", headers={"If-None-Match": tag})
        assert again.status_code in (200, 304) and (again.status_code == 200 or again.content == b"")
        assert again.status_code == 200 or again.headers["ETag"] == tag
        return again.status_code == 304

    # A sample may come between the two requests; sooner or later none does.
    await until(unchanged, "a 304 between two samples")


async def test_a_lists_etag_changes_when_a_sample_arrives(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    tag = (await fleet.request("GET", "/1.0/vz")).headers["ETag"]
    sampled_at = (await fleet.show(container))["status"]["sampled_at"]

    async def newer() -> bool:
        return bool((await fleet.show(container))["status"]["sampled_at"] > sampled_at)

    await until(newer, "another sample")
    response = await fleet.request("GET", "/1.0/vz", headers={"If-None-Match": f'"x", {tag}'})
    assert response.status_code == 200 and response.headers["ETag"] != tag


async def test_a_lists_etag_changes_with_every_container(fleet: Cluster) -> None:
    tags = [(await fleet.request("GET", "/1.0/vz")).headers["ETag"]]
    container = await make(fleet)
    tags.append((await fleet.request("GET", "/1.0/vz")).headers["ETag"])
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    tags.append((await fleet.request("GET", "/1.0/vz")).headers["ETag"])
    assert len(set(tags)) == 3
