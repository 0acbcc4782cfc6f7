"""lxcfs, by which a container's /proc shows its own limits: running before the agents, whoever starts it."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy.lib import processes, units
from deploy.lib.console import DeployError, environment, run, say, succeeds, wait_until

MOUNT_POINT = Path("/var/lib/lxcfs")
# Of the machine, not of one state directory: all containers here share the one lxcfs.
PID_FILE = Path("/run/vzfleet-lxcfs.pid")
START_TIMEOUT = 30.0


def up() -> None:
    """Start lxcfs where it is installed and does not run. Raises DeployError when it does not come up."""
    program = shutil.which("lxcfs", path=environment()["PATH"])
    if program is None or serves():
        return
    say("starting lxcfs")
    _clear()
    MOUNT_POINT.mkdir(parents=True, exist_ok=True)
    if units.systemd_runs():
        run(["systemctl", "enable", "--now", "lxcfs"])
    else:
        command = [program, "--foreground", "--pidfile", f"{PID_FILE}.lock", str(MOUNT_POINT)]
        child = processes.spawn(command, Path("/dev/null"))
        PID_FILE.write_text(f"{child.pid}\n")
    if not wait_until(serves, START_TIMEOUT):
        raise DeployError(f"lxcfs does not serve {MOUNT_POINT}; the kernel needs FUSE (/dev/fuse)")


def down() -> None:
    """End lxcfs if a quickstart on this machine started it and nobody needs it any more."""
    if processes.running(PID_FILE, str(MOUNT_POINT)) is None or _in_use():
        return
    say("stopping lxcfs")
    processes.end(PID_FILE, str(MOUNT_POINT))
    Path(f"{PID_FILE}.lock").unlink(missing_ok=True)
    _clear()


def serves() -> bool:
    """Whether a living lxcfs stands at its mount point."""
    try:
        return _mounted() and (MOUNT_POINT / "proc" / "meminfo").is_file()
    except OSError:  # ENOTCONN of a dead one
        return False


def _clear() -> None:
    """Take off what a dead lxcfs left: it answers "Transport endpoint is not connected"."""
    while _mounted() and succeeds(["umount", str(MOUNT_POINT)]):
        pass


def _mounted() -> bool:
    return str(MOUNT_POINT) in _mount_points(Path("/proc/self"))


def _in_use() -> bool:
    """Whether an agent runs here, or any process, of a container, sees lxcfs elsewhere than where it is mounted."""
    found = Path("/proc").glob("[0-9]*")
    return any(_mount_points(process) - {str(MOUNT_POINT)} or _is_agent(process) for process in found)


def _is_agent(process: Path) -> bool:
    try:
        return b"-m\0agent\0run\0" in (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def _mount_points(process: Path) -> set[str]:
    try:
        lines = (process / "mountinfo").read_text().splitlines()
    except OSError:  # it has ended
        return set()
    return {line.split()[4] for line in lines if " fuse.lxcfs " in line}
