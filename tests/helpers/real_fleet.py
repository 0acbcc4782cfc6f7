"""A real fleet on this machine, made by `deploy/quickstart`, and its containers as seen from outside."""

from __future__ import annotations

import json
import secrets
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUSYBOX: dict[str, Any] = {"type": "image", "properties": {"os": "busybox"}}


def until(condition: Callable[[], Any], what: str, seconds: float = 15.0) -> Any:
    """Wait for a condition; fail naming it when it does not come."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"did not happen within {seconds} s: {what}"
        time.sleep(0.05)
    return value


class RealFleet:
    """The API of the fleet, and its containers as root on their host sees them."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.reload()

    def reload(self) -> None:
        """Read the env file (anew)."""
        lines = (self.state / "env").read_text().splitlines()
        self.env = dict(line.split("=", 1) for line in lines)
        self._context = ssl.create_default_context(cafile=self.env["VZFLEET_CACERT"])

    def request(
        self, method: str, path: str, body: Any = None, data: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """A request by a client that is not ours: code and envelope."""
        kind = "application/octet-stream" if data is not None else "application/json"
        call = urllib.request.Request(
            self.env["VZFLEET_URL"] + path,
            method=method,
            data=data if data is not None else (None if body is None else json.dumps(body).encode()),
            headers={"Authorization": f"Bearer {self.env['VZFLEET_TOKEN']}", "Content-Type": kind, **(headers or {})},
        )
        try:
            with urllib.request.urlopen(call, context=self._context, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path: str) -> Any:
        """The metadata of a GET that must succeed."""
        code, answer = self.request("GET", path)
        assert code == 200, answer
        return answer["metadata"]

    def operation(self, method: str, path: str, body: Any = None, data: bytes | None = None) -> dict[str, Any]:
        """An operation, followed to its end."""
        code, answer = self.request(method, path, body, data)
        assert code == 202, answer
        ended: dict[str, Any] = self.get(f"{answer['operation']}/wait?timeout=110")
        assert ended["status_code"] >= 200, ended
        return ended

    def done(self, method: str, path: str, body: Any = None, data: bytes | None = None) -> dict[str, Any]:
        """An operation that must end in Success."""
        ended = self.operation(method, path, body, data)
        assert ended["status"] == "Success", ended
        return ended

    def show(self, container: str) -> dict[str, Any]:
        """GET of a container."""
        shown: dict[str, Any] = self.get(f"/1.0/vz/{container}")
        return shown

    def address(self, container: str) -> str:
        """Its address, once DHCP has given it one."""

        def known() -> Any:
            return self.show(container)["status"]["machine"][0]["ip_address"]

        return str(until(known, f"an address of {container}"))

    def new(self, node: str | None = None, start: bool = True, **body: Any) -> str:
        """A new busybox container with an id of its own."""
        container = f"t-{secrets.token_hex(4)}"
        wanted = {"hostname": container, "source": BUSYBOX, "start": start, **body}
        self.done("POST", f"/1.0/vz/{container}", {**wanted, **({"node": node} if node else {})})
        return container

    def state_of(self, container: str, action: str, **options: Any) -> None:
        """A change of state that must succeed."""
        self.done("PUT", f"/1.0/vz/{container}/state", {"action": action, **options})

    def delete(self, *containers: str) -> None:
        """Remove containers, running or not."""
        for container in containers:
            code, _ = self.request("GET", f"/1.0/vz/{container}")
            if code == 200:
                self.done("DELETE", f"/1.0/vz/{container}?force=1")

    # ------------------------------------------------------------ the host's side

    def agent_state(self, node: str) -> Path:
        """The state directory of a node's agent."""
        return self.state / "agents" / node

    def pid(self, name: str) -> int:
        """The pid of `controller` or `agent-<node>`."""
        return int((self.state / "run" / f"{name}.pid").read_text())

    def init(self, container: str) -> int:
        """The host's pid of a container's init."""
        return int(self.get(f"/1.0/vz/{container}/state")["pid"])

    def inside(self, container: str, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell script inside a container."""
        node = self.show(container)["node"]
        agent = self.pid(f"agent-{node}")
        attach = ["lxc-attach", "-n", container, "-P", str(self.agent_state(node) / "lxc"), "--clear-env", "--"]
        enter = ["nsenter", f"--net=/proc/{agent}/ns/net"]
        done = subprocess.run(
            [*enter, *attach, "/bin/sh", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    def root(self, container: str) -> Path:
        """A container's root file system on its host."""
        node = self.show(container)["node"]
        return self.agent_state(node) / "pool" / "containers" / container / "rootfs"

    def cgroup(self, container: str, controller: str) -> Path:
        """The container's outer cgroup directory, where its limits stand, in one hierarchy."""
        for line in Path(f"/proc/{self.init(container)}/cgroup").read_text().splitlines():
            number, names, path = line.split(":", 2)
            if controller in names.split(","):
                return Path("/sys/fs/cgroup") / controller / path.strip("/").removesuffix("/ns")
            if number == "0" and Path("/sys/fs/cgroup/cgroup.controllers").exists():
                return Path("/sys/fs/cgroup") / path.strip("/").partition("/ns/")[0]
        raise AssertionError(f"no hierarchy {controller}")


def quickstart(*arguments: str) -> None:
    """Run `deploy/quickstart`; it must succeed."""
    command = [str(ROOT / "deploy" / "quickstart"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@contextmanager
def real_fleet(nodes: int = 3) -> Iterator[RealFleet]:
    """A fleet that is gone without a trace afterwards."""
    state = Path("/var/tmp") / f"vzt-{secrets.token_hex(4)}"
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = ["--port", str(first.getsockname()[1]), "--agent-port", str(second.getsockname()[1])]
    try:
        quickstart("--state", str(state), *ports, "--nodes", str(nodes), "--no-demo")
        yield RealFleet(state)
    finally:
        quickstart("--state", str(state), "--down", "--purge")
        assert not state.exists()
