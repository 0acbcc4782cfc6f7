"""The Python environment below the state directory: made once, renewed when the sources changed."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

from deploy.lib.console import run, say
from deploy.lib.state import State, write

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "agent", "controller", "cli")
INSTALL_TIMEOUT = 900.0


def is_current(state: State, extra: str) -> bool:
    """Whether the environment holds this checkout as it stands, with an extra of setup.py ("" for an agent alone)."""
    stamp = _stamp(state)
    return stamp.exists() and stamp.read_text() == _wanted(extra)


def install(state: State, extra: str) -> None:
    """Install this checkout with an extra; the environment is made on the first run. Needs the network."""
    say("installing Python packages into an environment of their own")
    stamp = _wanted(extra)  # before the copy: what changes meanwhile is installed by the next run
    if not (state.venv / "bin" / "pip").exists():
        shutil.rmtree(state.venv, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(state.venv)], timeout=300)
    with tempfile.TemporaryDirectory(prefix="vzfleet-") as directory:
        # A copy: pip builds in the source directory, and would take up what an earlier build left there.
        source = Path(directory) / "vzfleet"
        _copy_sources(source)
        wanted = f"{source}[{extra}]" if extra else str(source)
        pip = [str(state.python), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
        # Not compiled: most of it is never imported, and what is, is compiled once.
        run([*pip, "install", "--no-compile", "--", wanted], timeout=INSTALL_TIMEOUT)
    # But for the agent: a process that compiles keeps 3 MB for its life (measured).
    run([str(state.python), "-c", "import agent.__main__, agent.enrolment, agent.drivers.lxc.driver"], timeout=300)
    write(_stamp(state), stamp, 0o644)


def _stamp(state: State) -> Path:
    return state.venv / "vzfleet.stamp"


def _wanted(extra: str) -> str:
    return f"{extra} {fingerprint(CHECKOUT)}\n"


def fingerprint(checkout: Path) -> str:
    """A digest of everything that is installed from the checkout."""
    digest = hashlib.sha256(sys.version.encode())
    for path in _sources(checkout):
        digest.update(f"{path.relative_to(checkout)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _sources(checkout: Path) -> list[Path]:
    files = [checkout / "setup.py", checkout / "pyproject.toml"]
    for package in PACKAGES:
        files += (
            path for path in (checkout / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
    return sorted(files)


def _copy_sources(target: Path) -> None:
    for path in _sources(CHECKOUT):
        copy = target / path.relative_to(CHECKOUT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
