"""The state directory: what stands where, who may pass, and what was decided on the first run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deploy.lib.console import DeployError


@dataclass(frozen=True)
class Node:
    """One agent of this machine. `namespace`: it has a network namespace of its own. `index` is from 1."""

    name: str
    index: int
    namespace: bool
    subnet: str | None = None
    """IPv4 network of its containers; None: the agent chooses, or `bridge` has it."""
    bridge: str | None = None
    """A bridge of the host; None: the agent makes one."""
    pool: str | None = None
    """A directory on a btrfs of the host; None: the agent makes a loop file."""


@dataclass(frozen=True)
class Settings:
    """What this machine was set up as; kept in `quickstart.json`. `port` 0: no controller here, just an agent."""

    port: int
    agent_port: int
    nodes: tuple[Node, ...] = ()
    fabric: str | None = None
    """IPv4 network that joins the namespaces; None: there are none."""

    def with_nodes(self, *nodes: Node) -> Settings:
        """A copy with more nodes."""
        return replace(self, nodes=(*self.nodes, *nodes))

    def with_fabric(self, network: str) -> Settings:
        """A copy with a network between the namespaces."""
        return replace(self, fabric=network)


@dataclass(frozen=True)
class State:
    """Paths below the state directory, and names made from it so that two of them never meet on one machine."""

    root: Path

    @property
    def tag(self) -> str:
        """Six hexadecimal digits that stand for this directory in names of bridges, namespaces and cgroups."""
        return hashlib.sha256(str(self.root).encode()).hexdigest()[:6]

    @property
    def settings_file(self) -> Path:
        return self.root / "quickstart.json"

    @property
    def venv(self) -> Path:
        return self.root / "venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def controller(self) -> Path:
        return self.root / "controller"

    @property
    def certificate(self) -> Path:
        return self.controller / "tls" / "ca.crt"

    @property
    def env_file(self) -> Path:
        return self.root / "env"

    @property
    def tool(self) -> Path:
        """A copy of this program, for the unit that brings the namespaces back after a reboot."""
        return self.root / "deploy"

    def agent(self, node: str) -> Path:
        """The state directory of one agent."""
        return self.root / "agents" / node

    def entries(self) -> list[Path]:
        """Everything that a quickstart makes directly below the state directory."""
        made = [self.venv, self.run, self.log, self.controller, self.tool, self.root / "agents"]
        return [*made, self.env_file, self.settings_file]


def check(state: State) -> None:
    """Look whether the state directory can be used, before anything is changed.

    Raises DeployError where a directory above bars containers' mapped roots, or where it holds something else.
    """
    for above in reversed(state.root.parents):
        if above.exists():
            check_passable(above)
    if state.root.exists() and not state.root.is_dir():
        raise DeployError(f"{state.root} is not a directory")
    own = not state.root.exists() or state.settings_file.exists() or not any(state.root.iterdir())
    if not own:
        raise DeployError(f"{state.root} holds files of something else: give an empty or a new directory by --state")


def prepare(state: State) -> None:
    """Make the state directory; one of our own that bars containers' mapped roots is given search permission."""
    _make_passable(state.root)
    for directory in (state.root / "agents", state.run):
        _make_passable(directory)
    state.log.mkdir(mode=0o700, exist_ok=True)


def check_passable(directory: Path) -> None:
    """Refuse a directory through which containers' mapped roots cannot pass. Raises DeployError with what to do."""
    if not directory.is_dir():
        raise DeployError(f"{directory} is not a directory")
    mode = stat.S_IMODE(directory.stat().st_mode)
    if not mode & stat.S_IXOTH:
        raise DeployError(
            f"{directory} has mode {mode:o}: the root of an unprivileged container is an ordinary user to this host "
            f"and cannot pass through it to its files. Give another directory, or: chmod o+x {directory}"
        )


def _make_passable(directory: Path) -> None:
    missing = [above for above in (directory, *directory.parents) if not above.exists()]
    for made in reversed(missing):
        made.mkdir()
        made.chmod(0o711)
    mode = stat.S_IMODE(directory.stat().st_mode)
    if not mode & stat.S_IXOTH:
        directory.chmod(mode | stat.S_IXOTH)


def load(state: State) -> Settings | None:
    """What was decided on an earlier run; None on the first. Raises DeployError when the file is damaged."""
    try:
        fields = json.loads(state.settings_file.read_text())
        nodes = tuple(Node(**node) for node in fields.pop("nodes"))
        return Settings(**fields, nodes=nodes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DeployError(f"{state.settings_file} is damaged: {error}") from None


def save(state: State, settings: Settings) -> None:
    """Keep what was decided, in one step."""
    write(state.settings_file, json.dumps(asdict(settings), indent=2) + "\n", 0o644)


def write(path: Path, text: str, mode: int) -> None:
    """Replace a file in one step; it never has another mode than `mode`."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "w") as handle:
        os.fchmod(handle.fileno(), mode)
        handle.write(text)
    temporary.replace(path)


@contextmanager
def alone(state: State) -> Iterator[None]:
    """Hold the state directory for this run. Raises DeployError when another quickstart works on it."""
    descriptor = os.open(state.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DeployError(f"another quickstart is working on {state.root}") from None
    else:
        yield
    finally:
        os.close(descriptor)
