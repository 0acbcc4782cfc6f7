"""A PostgreSQL server of the tests' own: on loopback, on a free port, in a directory of its own, ended by its pid."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.helpers.cluster import free_port

VERSIONS = Path("/usr/lib/postgresql")
USER = "postgres"
PATIENCE = 60.0
# Nothing of it must survive the machine: it is started, killed and forgotten.
OPTIONS = ("fsync=off", "full_page_writes=off", "shared_buffers=16MB", "max_connections=40", "logging_collector=off")


def programs() -> Path | None:
    """Where Debian's newest PostgreSQL has its programs; None where it is not installed."""
    found = sorted(VERSIONS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Server:
    """A server. `url` is of a new empty database each time; `stop`, `kill` and `start` are for tests of its absence."""

    def __init__(self, directory: Path, binaries: Path) -> None:
        self._directory = directory
        self._binaries = binaries
        self._user = USER if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self._data = directory / "data"
        self._run("initdb", "--auth=trust", "--username=vz", "--encoding=UTF8", "--locale=C", "--no-sync")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), "-D", str(self._data), *arguments]
        done = subprocess.run(command, user=self._user, capture_output=True, text=True, cwd=self._directory)
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [str(self._binaries / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._directory}"]
        for option in OPTIONS:
            command += ["-c", option]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, user=self._user, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory
            )
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self._connect("postgres").close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self._directory / "log").read_text()
                assert time.monotonic() < end, "PostgreSQL does not answer"
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: by SIGINT it ends its sessions, by SIGQUIT it falls down as in a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(PATIENCE)
            self._process = None

    def _connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="vz", dbname=database, autocommit=True, connect_timeout=5
        )

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of an empty database, which is dropped afterwards."""
        name = f"vz_{uuid.uuid4().hex[:12]}"
        with self._connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {name}")
        yield f"postgresql://vz@127.0.0.1:{self.port}/{name}"
        with self._connect("postgres") as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def server() -> Iterator[Server]:
    """A running server. Skips the test where PostgreSQL is not installed; on CI that is a failure."""
    binaries = programs()
    if binaries is None:
        assert os.environ.get("CI") != "true", "on CI the store is tested on PostgreSQL: install postgresql"
        pytest.skip("PostgreSQL is not installed")
    directory = Path(tempfile.mkdtemp(prefix="vzpg-", dir="/var/tmp"))
    try:
        if os.geteuid() == 0:
            owner = pwd.getpwnam(USER)
            os.chown(directory, owner.pw_uid, owner.pw_gid)
        made = Server(directory, binaries)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(directory)
