"""Debian packages: which are needed, which are missing, how they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from deploy.lib.console import DeployError, environment, run, say, tail

NODE = ["lxc", "lxcfs", "dnsmasq-base", "btrfs-progs", "rsync", "busybox-static", "uidmap", "iproute2", "mmdebstrap"]
ARCHIVES = ["bzip2", "xz-utils", "zstd"]
PYTHON = ["python3-venv"]
DATABASE = ["postgresql"]
"""For the tests alone, which start servers of their own."""
NEW_CLUSTERS = Path("/etc/postgresql-common/createcluster.conf")
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
INSTALL_TIMEOUT = 1200.0


def needed() -> list[str]:
    """The packages that this machine must have."""
    packages = NODE + ARCHIVES + PYTHON
    if not (shutil.which("nft", path=_path()) or shutil.which("iptables", path=_path())):
        packages = [*packages, "nftables"]
    # LXC's generated profiles are loaded by the parser; without it no container starts where the kernel has AppArmor.
    if APPARMOR.exists() and APPARMOR.read_text().startswith("Y"):
        packages = [*packages, "apparmor"]
    return packages


def missing(packages: list[str]) -> list[str]:
    """Those of `packages` that are not installed. Raises DeployError where the machine is not a Debian."""
    if not shutil.which("dpkg-query", path=_path()):
        raise DeployError(f"this is no Debian: install the counterparts of {', '.join(packages)} by hand")
    output = run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", "--", *packages], check=False
    )
    installed = {line.split()[0] for line in output.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def install(packages: list[str]) -> None:
    """Install what is missing of `packages`; nothing else is touched, recommended packages are left out."""
    absent = missing(packages)
    if not absent:
        return
    if os.geteuid() != 0:
        raise DeployError(f"not installed, and only root can: {' '.join(absent)}")
    say(f"installing Debian packages: {' '.join(absent)}")
    _update()
    _apt("install", "--yes", "--no-install-recommends", "--", *absent)


def install_database() -> None:
    """Install PostgreSQL's programs without the server that Debian's package starts where there was none."""
    if missing(DATABASE) and os.geteuid() == 0 and not NEW_CLUSTERS.exists():
        NEW_CLUSTERS.parent.mkdir(exist_ok=True)
        NEW_CLUSTERS.write_text("create_main_cluster = false\n")
    install(DATABASE)


@cache
def _update() -> None:
    """Bring the lists of packages up to date, once in a run."""
    _apt("update")


def _apt(*arguments: str) -> None:
    done = subprocess.run(
        ["apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=300", "-o", "APT::Sandbox::User=root", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=INSTALL_TIMEOUT,
        env=environment(DEBIAN_FRONTEND="noninteractive"),
    )
    if done.returncode != 0:
        raise DeployError(f"apt-get {arguments[0]} failed:\n{tail(done.stdout)}")


def _path() -> str:
    return environment()["PATH"]


def main() -> int:
    """Install what the tests need: the same as a node, and PostgreSQL."""
    try:
        install(needed())
        install_database()
    except DeployError as error:
        print(f"packages: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
