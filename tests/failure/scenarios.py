"""One request for each kind of operation, what must be there for it, and what removes both again."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.states import Status
from tests.failure.fleet import Answer, ProcessFleet
from tests.failure.processes import until
from tests.helpers.busybox import busybox_archive, with_files
from tests.helpers.streams import split_image

EMPTY = {"type": "none"}
SOURCE, TARGET = "node1", "node2"


@dataclass(frozen=True)
class Scenario:
    """How an operation of a kind comes about: `prepare` makes what it needs, `ask` asks for it.

    `prepare` uses no operation of this kind, so that a fail point of the kind is not reached by it.
    """

    kind: str
    prepare: Callable[[ProcessFleet, str], None]
    ask: Callable[[ProcessFleet, str], Answer]


def create(fleet: ProcessFleet, container: str, **options: Any) -> None:
    """An empty container on `SOURCE`."""
    fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": SOURCE, **options})


def _running(fleet: ProcessFleet, container: str) -> None:
    create(fleet, container, start=True)


def _frozen(fleet: ProcessFleet, container: str) -> None:
    _running(fleet, container)
    fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "freeze"})


def _with_snapshot(fleet: ProcessFleet, container: str) -> None:
    """Running, changed since its snapshot."""
    _running(fleet, container)
    fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "before"})


def _nothing(_fleet: ProcessFleet, _container: str) -> None:
    return


def _create(fleet: ProcessFleet, container: str) -> Answer:
    body = {"source": {"type": "image", "alias": container}, "node": SOURCE, "start": True}
    return fleet.request("POST", f"/1.0/vz/{container}", body)


def _update(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("PUT", f"/1.0/vz/{container}", {"config": {"user.changed": container}})


def _rename(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("POST", f"/1.0/vz/{container}", {"name": f"{container}-new", "hostname": "renamed"})


def _delete(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("DELETE", f"/1.0/vz/{container}?force=1")


def _copy(fleet: ProcessFleet, container: str) -> Answer:
    body = {"source": {"type": "copy", "source": container}, "node": TARGET, "start": True}
    return fleet.request("POST", f"/1.0/vz/{container}-copy", body)


def _move(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("POST", f"/1.0/vz/{container}", {"migration": True, "node": TARGET})


def _take(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("POST", f"/1.0/vz/{container}/snapshots", {"name": "taken"})


def _remove(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("DELETE", f"/1.0/vz/{container}/snapshots/before")


def _call_otherwise(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("POST", f"/1.0/vz/{container}/snapshots/before", {"name": "earlier"})


def _keep_for_long(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("PUT", f"/1.0/vz/{container}/snapshots/before", {"expires_at": "2100-01-01T00:00:00Z"})


def _restore(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("PUT", f"/1.0/vz/{container}", {"restore": "before"})


def _upload(fleet: ProcessFleet, alias: str) -> Answer:
    """An image that nothing else has, under an alias."""
    archive = with_files(busybox_archive(), {"own": (0o644, alias.encode())})
    return fleet.request("POST", f"/1.0/images?alias={alias}", archive)


def _image(fleet: ProcessFleet, alias: str) -> None:
    """An image that no node has."""
    identity = _upload(fleet, alias).operation
    assert identity is not None
    assert fleet.operation(identity)["status"] == "Success"


def _image_on_a_node(fleet: ProcessFleet, alias: str) -> None:
    _image(fleet, alias)
    create(fleet, alias, source={"type": "image", "alias": alias})


def _two_that_differ(fleet: ProcessFleet, container: str) -> None:
    _image_on_a_node(fleet, container)
    create(fleet, f"{container}-copy", node=TARGET)


def _refresh(fleet: ProcessFleet, container: str) -> Answer:
    body = {"source": {"type": "copy", "source": container, "refresh": True}}
    return fleet.request("POST", f"/1.0/vz/{container}-copy", body)


def _delete_image(fleet: ProcessFleet, alias: str) -> Answer:
    return fleet.request("DELETE", images(fleet)[alias])


def _offer(fleet: ProcessFleet, alias: str, serial: str) -> None:
    fleet.streams.add(f"tiny:{alias}:amd64:default", serial, split_image(f"{alias} {serial}", release=alias))


def _pull(fleet: ProcessFleet, alias: str) -> Answer:
    """An image of the image server, under an alias."""
    _offer(fleet, alias, "1")
    body = {"source": {"type": "image", "server": "images", "alias": f"tiny/{alias}"}, "alias": alias}
    return fleet.request("POST", "/1.0/images", body)


def _pulled(fleet: ProcessFleet, alias: str) -> None:
    identity = _pull(fleet, alias).operation
    assert identity is not None
    assert fleet.operation(identity)["status"] == "Success"


def _newest(fleet: ProcessFleet, alias: str) -> Answer:
    _offer(fleet, alias, "2")
    return fleet.request("POST", f"{images(fleet)[alias]}/refresh")


def _publish(fleet: ProcessFleet, container: str) -> Answer:
    """An image of a container's snapshot, under the container's name."""
    body = {"source": {"type": "snapshot", "name": f"{container}/before"}, "alias": container}
    return fleet.request("POST", "/1.0/images", body)


def _drained(fleet: ProcessFleet, container: str) -> None:
    create(fleet, container)
    fleet.done("POST", f"/1.0/nodes/{SOURCE}/state", {"action": "drain"})


def _made_by_hand(fleet: ProcessFleet, container: str) -> None:
    fleet.agents[SOURCE].kill()
    file = fleet.state(SOURCE) / "fake" / "world.json"
    world = fleet.world(SOURCE)
    spec = {"id": container, "generation": 0, "hostname": "", "hwaddr": "", "config": {}}
    world["containers"][container] = {"spec": spec, "status": int(Status.STOPPED), "content": "made by hand"}
    file.write_text(json.dumps(world))
    fleet.start_agent(SOURCE)
    seen = f"/1.0/nodes/{SOURCE}"
    until(lambda: container in fleet.call("GET", seen).metadata["unmanaged"], f"{container} is seen")


def _adopt(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("POST", f"/1.0/vz/{container}", {"source": {"type": "adopt"}, "node": SOURCE})


def _node(action: str) -> Callable[[ProcessFleet, str], Answer]:
    return lambda fleet, _container: fleet.request("POST", f"/1.0/nodes/{SOURCE}/state", {"action": action})


def images(fleet: ProcessFleet) -> dict[str, str]:
    """The URL of each image that has an alias, by that."""
    every = fleet.call("GET", "/1.0/images?recursion=1").metadata
    return {each["aliases"][0]["name"]: f"/1.0/images/{each['fingerprint']}" for each in every if each["aliases"]}


def _state(action: str) -> Callable[[ProcessFleet, str], Answer]:
    return lambda fleet, container: fleet.request("PUT", f"/1.0/vz/{container}/state", {"action": action})


SCENARIOS: dict[str, Scenario] = {
    scenario.kind: scenario
    for scenario in (
        Scenario("container.create", _image, _create),
        Scenario("container.update", _running, _update),
        Scenario("container.rename", create, _rename),
        Scenario("container.delete", _running, _delete),
        Scenario("container.start", create, _state("start")),
        Scenario("container.stop", _running, _state("stop")),
        Scenario("container.restart", _running, _state("restart")),
        Scenario("container.freeze", _running, _state("freeze")),
        Scenario("container.unfreeze", _frozen, _state("unfreeze")),
        Scenario("snapshot.create", _running, _take),
        Scenario("snapshot.delete", _with_snapshot, _remove),
        Scenario("snapshot.rename", _with_snapshot, _call_otherwise),
        Scenario("snapshot.update", _with_snapshot, _keep_for_long),
        Scenario("snapshot.restore", _with_snapshot, _restore),
        Scenario("container.copy", _running, _copy),
        Scenario("container.refresh", _two_that_differ, _refresh),
        Scenario("container.move", _running, _move),
        Scenario("image.import", _nothing, _upload),
        Scenario("image.pull", _nothing, _pull),
        Scenario("image.refresh", _pulled, _newest),
        Scenario("image.publish", _with_snapshot, _publish),
        Scenario("image.delete", _image_on_a_node, _delete_image),
        Scenario("container.adopt", _made_by_hand, _adopt),
        Scenario("node.drain", _running, _node("drain")),
        Scenario("node.restore", _drained, _node("restore")),
    )
}


WITHOUT = {"container.recover": "container.create", "container.recover-by-copy": "container.copy"}
"""Kinds without a scenario, since a host would have to be off for each, and the kind whose very steps they have."""
CLEANING = ("container.delete", "image.delete", "node.restore")
"""Kinds that `clean_up` uses."""


def new_name() -> str:
    """A container's id that nothing else has."""
    return f"c-{secrets.token_hex(4)}"


def clean_up(fleet: ProcessFleet, container: str) -> None:
    """Remove what a scenario made of a container or image: it too must be free to be deleted."""
    for name in (container, f"{container}-new", f"{container}-copy"):
        if fleet.request("GET", f"/1.0/vz/{name}").code == 200:
            fleet.done("DELETE", f"/1.0/vz/{name}?force=1")
    if fleet.node_status(SOURCE) == "Draining":
        answer = fleet.call("POST", f"/1.0/nodes/{SOURCE}/state", {"action": "restore", "mode": "skip"})
        assert answer.operation is None or fleet.operation(answer.operation)["status"] == "Success"
    if container in (found := images(fleet)):
        fleet.done("DELETE", found[container])
    for each in fleet.call("GET", "/1.0/images?recursion=1").metadata:
        # What a newer version has taken the place of has no alias any more.
        if each["properties"].get("release") == container:
            fleet.done("DELETE", f"/1.0/images/{each['fingerprint']}")
