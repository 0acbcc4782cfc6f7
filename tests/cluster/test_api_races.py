"""Several callers at once: one wins, the others are refused, and nothing is promised twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from tests.helpers.api import EMPTY, effects, make, name
from tests.helpers.cluster import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def together(fleet: Cluster, requests: list[tuple[str, str, Any]]) -> Counter[int]:
    """Send all at once, follow those that were accepted to their Success; gives how often each code was answered."""
    responses = await asyncio.gather(*(fleet.request(*request) for request in requests))
    accepted = [response.json()["operation"] for response in responses if response.status_code == 202]
    ends = await asyncio.gather(*(fleet.call("GET", f"{url}/wait?timeout=30") for url in accepted))
    assert [end["metadata"]["status"] for end in ends] == ["Success"] * len(ends)
    return Counter(response.status_code for response in responses)


async def test_one_of_many_gets_an_id(fleet: Cluster) -> None:
    container = name()
    requests = [("POST", f"/1.0/vz/{container}", {"source": EMPTY, "hostname": f"h{number}"}) for number in range(10)]
    assert await together(fleet, requests) == {202: 1, 409: 9}
    assert effects(fleet, container) == ["container.create"]


async def test_one_of_many_deletes(fleet: Cluster) -> None:
    container = await make(fleet)
    codes = await together(fleet, [("DELETE", f"/1.0/vz/{container}", None)] * 10)
    assert codes[202] == 1 and codes[409] + codes[404] == 9
    assert effects(fleet, container) == ["container.create", "container.delete"]


async def test_no_memory_is_promised_twice(fleet: Cluster) -> None:
    free = [
        node["capacity"]["memory"] - node["capacity"]["reserved_memory"]
        for node in (await fleet.call("GET", "/1.0/nodes?recursion=1"))["metadata"]
    ]
    four = 4 * 10**9
    ids = [name() for _ in range(12)]
    requests = [("POST", f"/1.0/vz/{id}", {"source": EMPTY, "config": {"limits.memory": "4GB"}}) for id in ids]
    codes = await together(fleet, requests)
    fit = sum(memory // four for memory in free)
    assert codes == {202: fit, 409: 12 - fit}
    for node in (await fleet.call("GET", "/1.0/nodes?recursion=1"))["metadata"]:
        assert node["capacity"]["reserved_memory"] <= node["capacity"]["memory"]
    for id in ids:
        if (await fleet.request("GET", f"/1.0/vz/{id}")).status_code == 200:
            await fleet.done("DELETE", f"/1.0/vz/{id}")


async def test_two_renames_to_one_id(fleet: Cluster) -> None:
    new = name()
    olds = [await make(fleet) for _ in range(2)]
    codes = await together(fleet, [("POST", f"/1.0/vz/{old}", {"name": new}) for old in olds])
    assert codes == {202: 1, 409: 1}
    assert (await fleet.show(new))["id"] == new


async def test_an_if_match_is_good_for_one_change(fleet: Cluster) -> None:
    container = await make(fleet)
    tag = (await fleet.request("GET", f"/1.0/vz/{container}")).headers["ETag"]
    url, headers = f"/1.0/vz/{container}", {"If-Match": tag}
    responses = await asyncio.gather(
        *(fleet.request("PUT", url, {"config": {"user.n": str(n)}}, headers=headers) for n in range(5))
    )
    [accepted] = [response.json() for response in responses if response.status_code == 202]
    assert {response.status_code for response in responses} <= {202, 409, 412}
    await fleet.call("GET", f"{accepted['operation']}/wait")
