"""deploy/quickstart on this machine, from nothing to nothing."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lib.state import State
from tests.leftovers import Machine

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "deploy" / "quickstart"
pytestmark = [pytest.mark.lxc, pytest.mark.serial, pytest.mark.timeout(600)]


@pytest.fixture
def place() -> Iterator[State]:
    """A state directory of this test alone; purged, whatever happened."""
    state = State(Path("/var/tmp") / f"vzq-{secrets.token_hex(4)}")
    yield state
    if state.root.exists():
        run("--state", str(state.root), "--down", "--purge")
    assert not state.root.exists()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """The machine before the test; everything is gone again after it."""
    before = Machine.now()
    files = {path: path.read_text() for path in (Path("/etc/subuid"), Path("/etc/subgid"))}
    rules, cgroups = firewall(), our_cgroups()
    yield before
    assert Machine.now() == before
    assert firewall() == rules
    assert our_cgroups() == cgroups
    assert {path: path.read_text() for path in files} == files


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([QUICKSTART, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def firewall() -> str:
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout


def our_cgroups() -> set[str]:
    return {str(path) for path in Path("/sys/fs/cgroup").glob("**/*vz*") if path.is_dir()}


def processes(place: State) -> list[str]:
    """Command lines of the processes that have the state directory among their arguments."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(place.root) in line and "pytest" not in line:
            lines.append(line)
    return lines


def two_ports() -> list[str]:
    """Options with two ports that nothing listens on."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return ["--port", str(first.getsockname()[1]), "--agent-port", str(second.getsockname()[1])]


def environment(place: State) -> dict[str, str]:
    return dict(line.split("=", 1) for line in place.env_file.read_text().splitlines())


def request(place: State, method: str, path: str, body: Any = None) -> Any:
    """What the documents tell people to do with curl."""
    env = environment(place)
    context = ssl.create_default_context(cafile=env["VZFLEET_CACERT"])
    call = urllib.request.Request(
        env["VZFLEET_URL"] + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {env['VZFLEET_TOKEN']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call, context=context, timeout=30) as response:
        return json.load(response)["metadata"]


def shown_container(output: str) -> Any:
    return json.JSONDecoder().raw_decode(output[output.index("{") :])[0]


def pid(place: State, name: str) -> int:
    number = int((place.run / f"{name}.pid").read_text())
    assert Path(f"/proc/{number}").exists()
    return number


def test_one_node_from_nothing_to_nothing(place: State, machine: Machine) -> None:
    options = ["--state", str(place.root), *two_ports()]
    output = run(*options).stdout
    container = shown_container(output)
    figures = container["status"]["machine"][0]
    assert (container["hostname"], container["status"]["status"]) == ("demo", "Running")
    assert figures["memory"] == "256MB" and figures["ip_address"]
    assert f"https://{environment(place)['VZFLEET_URL'].rpartition(':')[2]}" not in output
    assert "/ui/" in output and "curl -sS --cacert" in output
    assert stat.S_IMODE(place.env_file.stat().st_mode) == 0o600
    assert list(environment(place)) == ["VZFLEET_URL", "VZFLEET_TOKEN", "VZFLEET_CACERT"]
    assert environment(place)["VZFLEET_TOKEN"] not in output

    before = {name: pid(place, name) for name in ("controller", "agent-node1")}
    env = place.env_file.read_text()
    started = time.monotonic()
    again = run("--state", str(place.root)).stdout
    assert time.monotonic() - started < 5
    assert shown_container(again)["status"]["status"] == "Running"
    assert {name: pid(place, name) for name in before} == before
    assert place.env_file.read_text() == env

    os.kill(before["agent-node1"], signal.SIGKILL)
    run("--state", str(place.root))
    assert pid(place, "controller") == before["controller"]
    assert pid(place, "agent-node1") != before["agent-node1"]

    run("--state", str(place.root), "--down")
    assert processes(place) == []
    assert Machine.now() == machine
    assert place.env_file.exists()

    assert shown_container(run("--state", str(place.root)).stdout)["status"]["status"] == "Running"
    assert place.env_file.read_text() == env

    run("--state", str(place.root), "--down", "--purge")
    assert processes(place) == []
    assert not place.root.exists()


def test_two_nodes_in_namespaces_come_back_after_these_are_gone(place: State, machine: Machine) -> None:
    run("--state", str(place.root), *two_ports(), "--nodes", "2", "--no-demo")
    nodes = request(place, "GET", "/1.0/nodes?recursion=1")
    assert {node["name"]: node["status"] for node in nodes} == {"node1": "Online", "node2": "Online"}
    networks = {Path(f"/proc/{pid(place, f'agent-{name}')}/ns/net").readlink() for name in ("node1", "node2")}
    assert len(networks | {Path("/proc/self/ns/net").readlink()}) == 3

    run("--state", str(place.root), "--down")
    assert Machine.now() == machine
    assert processes(place) == []

    container = shown_container(run("--state", str(place.root)).stdout)
    assert container["status"]["status"] == "Running"
    assert container["node"] in ("node1", "node2")


def test_an_agent_of_another_state_directory_joins(place: State, machine: Machine) -> None:
    other = State(Path(f"{place.root}-web2"))
    run("--state", str(place.root), *two_ports(), "--no-demo")
    try:
        token = request(place, "POST", "/1.0/nodes", {"name": "web2"})["token"]
        run("--state", str(other.root), "--join", token)
        number = pid(other, "agent-web2")
        deadline = time.monotonic() + 20
        while request(place, "GET", "/1.0/nodes/web2")["status"] != "Online":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run("--state", str(other.root))
        assert pid(other, "agent-web2") == number
        assert run("--state", str(other.root), "--join", "nonsense", check=False).returncode == 0
    finally:
        run("--state", str(other.root), "--down", "--purge")
    assert not other.root.exists()


def test_refusals_leave_nothing(place: State, machine: Machine) -> None:
    closed = place.root.with_name(f"{place.root.name}-closed")
    closed.mkdir(mode=0o700)
    try:
        refused = run("--state", str(closed / "fleet"), check=False)
        assert (refused.returncode, list(closed.iterdir())) == (1, [])
        assert f"chmod o+x {closed}" in refused.stderr
    finally:
        shutil.rmtree(closed)
    assert run("--state", str(place.root), "--join", "nonsense", check=False).returncode == 1
    assert run("--state", str(place.root), "--port", "8444", check=False).returncode == 1
    assert not place.root.exists()
    assert "nothing is set up" in run("--state", str(place.root / "absent"), "--down", "--purge").stdout
