"""deploy/quickstart on this machine, from nothing to nothing."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from deploy.lib.console import wait_until
from deploy.lib.state import State
from tests.leftovers import Machine

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.lxc, pytest.mark.serial, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in a copy of the checkout, which nobody edits meanwhile and which knows nothing of git."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("deploy", "common", "agent", "controller", "cli"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copyfile(ROOT / name, copy / name)
    return copy / "deploy" / "quickstart"


@dataclass(frozen=True)
class Place:
    """A state directory of one test alone, and the program that works on it."""

    state: State
    program: Path

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the program on the state directory."""
        command = [str(self.program), "--state", str(self.state.root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    def purge(self) -> None:
        """Remove all, and see that nothing is left."""
        self.run("--down", "--purge")
        assert not self.state.root.exists()
        assert self.traces() == []

    def traces(self) -> list[str]:
        """What runs or stands outside of the state directory for it."""
        names = [name for kind in asdict(Machine.now()).values() for name in kind]
        names += [str(path) for path in Path("/sys/fs/cgroup").glob("**/*vz*") if path.is_dir()]
        names += subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout.split()
        names += [line for path in ("/etc/subuid", "/etc/subgid") for line in Path(path).read_text().splitlines()]
        names += command_lines()
        return [name for name in names if str(self.state.root) in name or self.state.tag in name]

    def pid(self, name: str) -> int:
        """The pid in a pid file, of a process that runs."""
        number = int((self.state.run / f"{name}.pid").read_text())
        assert Path(f"/proc/{number}").exists()
        return number

    def environment(self) -> dict[str, str]:
        """The variables of the env file."""
        return dict(line.split("=", 1) for line in self.state.env_file.read_text().splitlines())

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """What the documents tell people to do with curl."""
        env = self.environment()
        call = urllib.request.Request(
            env["VZFLEET_URL"] + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {env['VZFLEET_TOKEN']}", "Content-Type": "application/json"},
        )
        context = ssl.create_default_context(cafile=env["VZFLEET_CACERT"])
        with urllib.request.urlopen(call, context=context, timeout=30) as response:
            return json.load(response)["metadata"]


@pytest.fixture
def place(quickstart: Path) -> Iterator[Place]:
    """A new state directory; it is purged, whatever happened."""
    place = Place(State(Path("/var/tmp") / f"vzq-{secrets.token_hex(4)}"), quickstart)
    before = Machine.now()
    yield place
    if place.state.root.exists():
        place.purge()
    if os.environ.get("CI") == "true":  # there nobody else makes anything meanwhile
        assert Machine.now() == before


def command_lines() -> list[str]:
    """Those of all processes but the tests' own."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " "))
    return [line for line in lines if "pytest" not in line]


def two_ports() -> list[str]:
    """Options with two ports that nothing listens on."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return ["--port", str(first.getsockname()[1]), "--agent-port", str(second.getsockname()[1])]


def shown_container(output: str) -> Any:
    return json.JSONDecoder().raw_decode(output[output.index("{") :])[0]


def test_one_node_from_nothing_to_nothing(place: Place) -> None:
    output = place.run(*two_ports()).stdout
    container = shown_container(output)
    figures = container["status"]["machine"][0]
    assert (container["hostname"], container["status"]["status"]) == ("demo", "Running")
    assert figures["memory"] == "256MB" and figures["ip_address"]
    assert "/ui/" in output and "curl -sS --cacert" in output
    assert stat.S_IMODE(place.state.env_file.stat().st_mode) == 0o600
    assert list(place.environment()) == ["VZFLEET_URL", "VZFLEET_TOKEN", "VZFLEET_CACERT"]
    assert place.environment()["VZFLEET_TOKEN"] not in output

    before = {name: place.pid(name) for name in ("controller", "agent-node1")}
    env = place.state.env_file.read_text()
    started = time.monotonic()
    again = place.run().stdout
    assert time.monotonic() - started < 5
    assert shown_container(again)["status"]["status"] == "Running"
    assert {name: place.pid(name) for name in before} == before
    assert place.state.env_file.read_text() == env

    init = place.request("GET", "/1.0/vz/demo/state")["pid"]
    os.kill(before["agent-node1"], signal.SIGKILL)
    place.run()
    assert place.pid("controller") == before["controller"]
    assert place.pid("agent-node1") != before["agent-node1"]
    assert place.request("GET", "/1.0/vz/demo/state")["pid"] == init

    place.run("--down")
    assert place.traces() == []
    assert place.state.env_file.exists()

    assert shown_container(place.run().stdout)["status"]["status"] == "Running"
    assert place.state.env_file.read_text() == env
    place.purge()


def test_nodes_in_namespaces_come_back_after_these_are_gone(place: Place) -> None:
    place.run(*two_ports(), "--nodes", "2", "--no-demo")
    nodes = place.request("GET", "/1.0/nodes?recursion=1")
    assert {node["name"]: node["status"] for node in nodes} == {"node1": "Online", "node2": "Online"}
    networks = {Path(f"/proc/{place.pid(f'agent-{name}')}/ns/net").readlink() for name in ("node1", "node2")}
    assert len(networks | {Path("/proc/self/ns/net").readlink()}) == 3

    place.run("--down")
    assert place.traces() == []

    container = shown_container(place.run().stdout)
    assert container["status"]["status"] == "Running"
    assert container["node"] in ("node1", "node2")
    place.purge()


def test_new_sources_restart_the_processes_and_no_container(place: Place) -> None:
    place.run(*two_ports())
    before = {name: place.pid(name) for name in ("controller", "agent-node1")}
    init = place.request("GET", "/1.0/vz/demo/state")["pid"]
    assert init > 1
    with (place.program.parents[1] / "common" / "__init__.py").open("a") as source:
        source.write("\n# changed\n")
    place.run()
    assert all(place.pid(name) != number for name, number in before.items())
    assert place.request("GET", "/1.0/vz/demo/state")["pid"] == init
    installed = next(place.state.venv.glob("lib/python3*/site-packages/common/__init__.py"))
    assert "# changed" in installed.read_text()


def test_an_agent_of_another_state_directory_joins(place: Place) -> None:
    other = replace(place, state=State(Path(f"{place.state.root}-web2")))
    place.run(*two_ports(), "--no-demo")
    token = place.request("POST", "/1.0/nodes", {"name": "web2"})["token"]
    try:
        other.run("--join", token)
        number = other.pid("agent-web2")
        assert wait_until(lambda: place.request("GET", "/1.0/nodes/web2")["status"] == "Online", 20)
        other.run()
        other.run("--join", token)
        assert other.pid("agent-web2") == number
    finally:
        other.purge()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A bridge with DHCP and a mounted btrfs, which are the operator's."""
    name = f"vzop-{secrets.token_hex(3)}"
    pool = Path(tempfile.mkdtemp(prefix="vzop-", dir="/var/tmp"))
    pool.chmod(0o711)
    image, leases, pid_file = (tmp_path / name for name in ("pool.img", "leases", "dnsmasq.pid"))
    with image.open("wb") as file:
        file.truncate(2**30)
    network = f"10.89.{secrets.randbelow(256)}"
    dhcp = [
        f"--interface={name}",
        "--except-interface=lo",
        "--bind-dynamic",
        "--port=0",
        "--user=root",
        "--keep-in-foreground",
    ]
    dhcp += [
        "--conf-file=/dev/null",
        f"--dhcp-range={network}.50,{network}.99",
        f"--dhcp-leasefile={leases}",
        f"--pid-file={pid_file}",
    ]
    run("ip", "link", "add", name, "type", "bridge")
    try:
        run("ip", "address", "add", f"{network}.1/24", "dev", name)
        run("ip", "link", "set", name, "up")
        run("mkfs.btrfs", "--quiet", str(image))
        run("mount", "-o", "loop", str(image), str(pool))
        with subprocess.Popen(["dnsmasq", *dhcp], stderr=subprocess.DEVNULL) as server:
            try:
                yield name, pool
            finally:
                server.terminate()
    finally:
        subprocess.run(["umount", str(pool)], check=False, capture_output=True)
        pool.rmdir()
        run("ip", "link", "delete", name)


def run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True)


def test_a_bridge_and_a_pool_of_the_host_are_used_and_kept(place: Place, host: tuple[str, Path]) -> None:
    bridge, pool = host
    (pool / "images").mkdir()
    refused = place.run("--bridge", "lo", check=False)
    assert (refused.returncode, place.state.root.exists()) == (1, False)
    given = ("--bridge", bridge, "--pool", str(pool))
    container = shown_container(place.run(*two_ports(), *given).stdout)
    assert container["status"]["machine"][0]["ip_address"].startswith("10.89.")
    assert place.request("GET", "/1.0/nodes/node1")["subnet"] is None
    own = pool / f"vzfleet-{place.state.tag}-node1"
    assert (own / "containers" / "demo" / "rootfs").is_dir()
    place.run(*given)
    assert "set up with --pool" in place.run("--pool", "/var/tmp", check=False).stderr

    place.purge()
    assert [path.name for path in pool.rglob("*")] == ["images"]
    assert Path("/sys/class/net", bridge).exists() and pool.is_mount()


def test_refusals_leave_nothing(place: Place) -> None:
    closed = place.state.root.with_name(f"{place.state.root.name}-closed")
    closed.mkdir(mode=0o700)
    try:
        refused = replace(place, state=State(closed / "fleet")).run(check=False)
        assert (refused.returncode, list(closed.iterdir())) == (1, [])
        assert f"chmod o+x {closed}" in refused.stderr
    finally:
        closed.rmdir()
    assert "no join token" in place.run("--join", "nonsense", check=False).stderr
    assert "must differ" in place.run("--port", "8444", check=False).stderr
    assert "nothing is set up" in place.run("--down", "--purge").stdout
    assert not place.state.root.exists()
