"""What holds after any fault, looked at from outside: REST answers, both sides' files, /proc.

Each `check_…` returns what it found broken, as sentences; an empty list is good. `settled` runs all of them once
nothing is under way any more.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from common.codec import decode_from_agent
from common.messages import Result
from common.states import Status
from tests.failure.fleet import ProcessFleet

RUNNING = (int(Status.RUNNING), int(Status.FROZEN))
SETTLE_TIME = 10.0
"""I5: seconds after healing in which what the API says becomes what the nodes have."""
Found = list[str]


def operations(fleet: ProcessFleet) -> dict[str, dict[str, Any]]:
    """All operations that the API knows, by id."""
    found: dict[str, dict[str, Any]] = {}
    cursor = ""
    while True:
        groups = fleet.call("GET", f"/1.0/operations?recursion=1&limit=1000{cursor}").metadata
        page = {str(each["id"]): each for group in groups.values() for each in group}
        found |= page
        if len(page) < 1000:
            return found
        cursor = f"&cursor={min(page)}"


def wait_until_ended(fleet: ProcessFleet, accepted: Iterable[str], seconds: float = 60.0) -> None:
    """Wait until these operations have ended or the time is over: I1 then tells which have not."""
    end = time.monotonic() + seconds
    for identity in accepted:
        left = max(0, int(end - time.monotonic()))
        fleet.request("GET", f"/1.0/operations/{identity}/wait?timeout={left}")


def check_ends(accepted: Iterable[str], known: Mapping[str, Mapping[str, Any]]) -> Found:
    """I1: every operation answered with 202 exists and has one terminal state, with a reason when it failed."""
    found = []
    for identity in accepted:
        operation = known.get(identity)
        if operation is None:
            found.append(f"I1: operation {identity} was acknowledged and is unknown")
        elif operation["status_code"] < 200:
            found.append(f"I1: operation {identity} ({operation['description']}) is still {operation['status']}")
        elif operation["status"] != "Success" and not operation["err"]:
            found.append(f"I1: operation {identity} ended as {operation['status']} without a reason")
    return found


def check_effects(
    effects: Iterable[tuple[str, str, str, str]],
    known: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, Iterable[tuple[str, str]]] | None = None,
) -> Found:
    """I2: no command of an operation had its effect twice, and one that says Success had all that it stands for.

    `expected` maps an operation's id to its effects (step, driver's command), each of which must be there once.
    """
    counted = Counter((identity, command) for _, command, _, identity in effects)
    found = [
        f"I2: {command} was done {times} times for {identity}"
        for (identity, command), times in counted.items()
        if times > 1
    ]
    for operation, wanted in (expected or {}).items():
        if operation in known and known[operation]["status"] == "Success":
            for step, command in wanted:
                # A round that could not go directly went by the relay.
                times = sum(counted[f"{operation}/{step}{way}", command] for way in ("", "-relayed"))
                if times != 1:
                    found.append(
                        f"I2: operation {operation} says Success, and {command} of {step} was done {times} times"
                    )
    return found


def check_one_place(worlds: Mapping[str, Mapping[str, Any]]) -> Found:
    """I3: no container runs on two nodes."""
    places: dict[str, list[str]] = {}
    for node, world in worlds.items():
        for container, there in world["containers"].items():
            if there["status"] in RUNNING:
                places.setdefault(container, []).append(node)
    return [f"I3: {container} runs on {', '.join(nodes)}" for container, nodes in places.items() if len(nodes) > 1]


def check_transfers(worlds: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> Found:
    """I6: nodes keep nothing of transfers that have ended, unless the operation says that it could not clean up."""
    return [
        f"I6: {node} keeps what transfer {transfer} ({operation['kind']}) needed"
        for node, world in worlds.items()
        for transfer in world.get("transfers", {})
        if (operation := known.get(transfer)) is not None
        and operation["status_code"] >= 200
        and "left_behind" not in (operation["metadata"] or {})
        and "could not be undone" not in operation["err"]
    ]


def check_same(shown: Mapping[str, Mapping[str, Any]], worlds: Mapping[str, Mapping[str, Any]]) -> Found:
    """I5 and I6: each container that the API shows is on its node as it says, and nowhere is another one.

    `shown` is by id, as GET with recursion gives it, with `snapshots` (names) beside. One whose creation failed is
    on no node.
    """
    found = []
    every = {(name, node): each for node, world in worlds.items() for name, each in world["containers"].items()}
    # What was made by hand is nobody's.
    there = {place: each for place, each in every.items() if each["spec"]["generation"] or place[0] in shown}
    for container, view in shown.items():
        real = there.pop((container, view["node"]), None)
        if view["status"]["status"] == "Error" and "creation failed" in view["status"].get("reason", ""):
            if real is not None:
                found.append(f"I6: the creation of {container} failed, and it is on {view['node']}")
            continue
        if real is None:
            found.append(f"I5: {container} is shown as {view['status']['status']} and is not on {view['node']}")
            continue
        pairs = {
            "status": (view["status"]["status_code"], real["status"]),
            "hostname": (view["hostname"], real["spec"]["hostname"]),
            "config": (view["config"], real["spec"].get("config", {})),
            "snapshots": (sorted(view["snapshots"]), sorted(each["name"] for each in real["snapshots"])),
        }
        found += [
            f"I5: {container}: {what} {said} is shown, {is_}" for what, (said, is_) in pairs.items() if said != is_
        ]
    return found + [f"I6: {container} is left on {node}, where nothing should be" for container, node in there]


def shown(fleet: ProcessFleet) -> dict[str, dict[str, Any]]:
    """All containers as the API shows them, by id, with the names of their snapshots."""
    views = fleet.call("GET", "/1.0/vz?recursion=1").metadata
    for view in views:
        urls = fleet.call("GET", f"/1.0/vz/{view['id']}/snapshots").metadata
        view["snapshots"] = [url.rpartition("/")[2] for url in urls]
    return {view["id"]: view for view in views}


def check_files(fleet: ProcessFleet) -> Found:
    """I6: no half-written file is left on either side."""
    patterns = {
        fleet.settings.state / "images": ("image-*", "incoming/*"),
        **{fleet.state(node) / "images": ("*",) for node in fleet.nodes},
        **{fleet.state(node) / "fake": (".*",) for node in fleet.nodes},
    }
    files = [file for where, globs in patterns.items() for each in globs for file in where.glob(each)]
    return [f"I6: {file.relative_to(fleet.directory)} is left behind" for file in files]


# ---------------------------------------------------------------- the files of both sides


def rows(file: Path, query: str) -> list[tuple[Any, ...]]:
    """What a query gives on a SQLite file, opened read-only."""
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10)) as database:
        return database.execute(query).fetchall()


def check_whole(file: Path) -> Found:
    """I4: SQLite finds nothing wrong with a database."""
    try:
        answer = [row[0] for row in rows(file, "PRAGMA integrity_check")]
    except sqlite3.DatabaseError as error:
        answer = [str(error)]
    return [] if answer == ["ok"] else [f"I4: {file.name}: {answer[:3]}"]


def check_rows(database: Path) -> Found:
    """I4: no container belongs to an operation that has ended, none is being created by nobody; no event is missing."""
    unfinished = {row[0] for row in rows(database, "SELECT id FROM operations WHERE status < 200")}
    found = []
    for container, phase, operation in rows(database, "SELECT id, phase, operation FROM containers"):
        if operation is not None and operation not in unfinished:
            found.append(f"I4: container {container} belongs to operation {operation}, which has ended")
        if phase == "creating" and operation is None:
            found.append(f"I4: container {container} is being created by no operation")
    ((events, first, last),) = rows(database, "SELECT count(*), min(sequence), max(sequence) FROM events")
    if events and last - first + 1 != events:
        found.append(f"I4: {events} events are numbered from {first} to {last}")
    return found


def check_journal(
    node: str,
    journal: Path,
    known: Mapping[str, Mapping[str, Any]],
    effects: Iterable[tuple[str, str, str, str]],
) -> Found:
    """I4: what a node journalled is what the controller recorded and what its driver did.

    Every command is of a known operation; when that says Success, it has its result, which is no error unless it undid
    a step; every effect stands in the journal; all results are acknowledged.
    """
    found = []
    entries = {row[0]: row[1:] for row in rows(journal, "SELECT id, result, acknowledged FROM commands")}
    for command, (packed, acknowledged) in entries.items():
        identity = command.partition("/")[0]
        operation = known.get(identity)
        if operation is None:
            found.append(f"I4: {node} journalled {command} of an operation that is unknown")
            continue
        # To send data has no effect on a node: whether it was received decides, and after a restart it is sent anew.
        sends = "/do-send" in command
        # A graceful stop that failed was followed by one by force, a round that could not go directly by a relayed one.
        followed = {f"{command}-force", f"{command}-relayed"} & entries.keys()
        if packed is None:
            # One that was under way when its agent was killed is not sent again once its operation has turned back.
            if operation["status"] in ("Success", "Running", "Pending") and not (sends or followed):
                found.append(f"I4: {node} never finished {command}")
            continue
        if not acknowledged:
            found.append(f"I4: the result of {command} is not acknowledged to {node}")
        counts = "/do" in command and not (followed or sends)
        if counts and operation["status"] == "Success" and (error := _error(packed)):
            found.append(f"I4: operation {identity} says Success, and {command} failed on {node}: {error}")
    done = {identity for where, _, _, identity in effects if where == node and identity != "-"}
    return found + [f"I4: {node} did {each} and has it not in its journal" for each in sorted(done - entries.keys())]


def _error(packed: bytes) -> str | None:
    result = decode_from_agent(packed)
    return result.error.text if isinstance(result, Result) and result.error is not None else None


# ---------------------------------------------------------------- resources


def check_flat(what: str, figures: list[float], most: float) -> Found:
    """I7: a figure does not grow: its slope (least squares) over the whole time is at most `most`."""
    growth = slope(figures) * max(0, len(figures) - 1)
    return [f"I7: {what} grew by {growth:,.0f} (at most {most:,.0f}): {figures}"] if growth > most else []


def slope(figures: list[float]) -> float:
    """Least squares: growth from one figure to the next."""
    number = len(figures)
    if number < 2:
        return 0.0
    middle = (number - 1) / 2
    average = sum(figures) / number
    above = sum((index - middle) * (figure - average) for index, figure in enumerate(figures))
    return above / sum((index - middle) ** 2 for index in range(number))


# ---------------------------------------------------------------- all together


def eventually(check: Callable[[], Found], seconds: float = SETTLE_TIME) -> Found:
    """What a check still finds when it has been good at no moment within so many seconds."""
    end = time.monotonic() + seconds
    while (found := check()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def settled(
    fleet: ProcessFleet,
    accepted: Iterable[str],
    expected: Mapping[str, Iterable[tuple[str, str]]] | None = None,
    *,
    wait: float = 60.0,
    settle: float = SETTLE_TIME,
) -> Found:
    """I1 to I6 on a healed fleet: waits for the end of the accepted operations, then looks at everything."""
    accepted = list(accepted)
    wait_until_ended(fleet, accepted, wait)
    known = operations(fleet)
    found = check_ends(accepted, known)
    found += eventually(lambda: check_same(shown(fleet), worlds(fleet)), settle)
    found += check_one_place(worlds(fleet)) + check_effects(fleet.effects(), known, expected)
    found += check_transfers(worlds(fleet), known)
    database = fleet.settings.state / "controller.db"
    found += check_whole(database) + check_rows(database) + check_files(fleet)
    for node in fleet.nodes:
        journal = fleet.state(node) / "journal.db"
        found += check_whole(journal)
        found += eventually(partial(_check_node, fleet, node, known), settle)
    return found


def _check_node(fleet: ProcessFleet, node: str, known: Mapping[str, Mapping[str, Any]]) -> Found:
    return check_journal(node, fleet.state(node) / "journal.db", known, fleet.effects(node))


def worlds(fleet: ProcessFleet) -> dict[str, dict[str, Any]]:
    """What each node has, by its name."""
    return {node: fleet.world(node) for node in fleet.nodes}


def as_it_is(fleet: ProcessFleet, container: str) -> object:
    """What of a container must be as before when an operation on it was undone; None where there is none."""
    view = shown(fleet).get(container)
    real = [world["containers"][container] for world in worlds(fleet).values() if container in world["containers"]]
    if view is None or not real:
        return None
    content = {key: real[0][key] for key in ("status", "content", "spec")}
    return {key: view[key] for key in ("node", "hostname", "config", "snapshots")} | content
