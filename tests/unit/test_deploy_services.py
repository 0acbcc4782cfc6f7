"""Processes by pid files, systemd units, and the commands that services run."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lib import console, processes, services, units
from deploy.lib.arguments import DEFAULT_STATE
from deploy.lib.state import Node, Settings, State

SETTINGS = Settings(9443, 9444, (Node("node1", 1, False),))
WRITES_PID = """
import os, pathlib, signal, sys
print("begun", flush=True)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
signal.pause()
"""
IGNORES_TERM = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    code = "import signal; print(flush=True); signal.pause()"
    command = [sys.executable, "-c", code, "word", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pid_file = tmp_path / "sleeper.pid"
        pid_file.write_text(f"{process.pid}\n")
        yield process, pid_file
        process.kill()


def test_a_process_is_known_by_pid_and_arguments(sleeper: tuple[subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    process, pid_file = sleeper
    assert processes.running(pid_file, "word", str(tmp_path)) == process.pid
    assert processes.running(pid_file, "word", "/elsewhere") is None


def test_a_process_that_took_the_pid_is_left_alone(sleeper: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, pid_file = sleeper
    assert not processes.end(pid_file, "controller", "/elsewhere")
    assert process.poll() is None
    assert not pid_file.exists()


def test_end_waits_until_the_process_is_gone(sleeper: tuple[subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    process, pid_file = sleeper
    assert processes.end(pid_file, "word", str(tmp_path))
    assert process.poll() == -15
    assert not pid_file.exists()
    assert not processes.end(pid_file, "word", str(tmp_path))


def test_what_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_TIMEOUT", 0.2)
    with subprocess.Popen([sys.executable, "-c", IGNORES_TERM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pid_file = tmp_path / "stubborn.pid"
        pid_file.write_text(str(process.pid))
        assert processes.end(pid_file, IGNORES_TERM)
        assert process.wait(5) == -9


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "999999999"])
def test_a_pid_file_of_nothing_is_nothing(tmp_path: Path, text: str) -> None:
    pid_file = tmp_path / "some.pid"
    pid_file.write_text(text)
    assert processes.running(pid_file, "word") is None
    assert processes.running(tmp_path / "absent.pid") is None


def test_services_run_the_environments_python_with_the_documented_files(tmp_path: Path) -> None:
    state = State(tmp_path)
    controller, agent = services.controller(state, SETTINGS), services.agent(state, SETTINGS.nodes[0])
    assert controller.arguments[:4] == [f"{tmp_path}/venv/bin/python", "-m", "controller", "run"]
    assert controller.pid_file == tmp_path / "run" / "controller.pid"
    assert agent.arguments[:4] == [f"{tmp_path}/venv/bin/python", "-m", "agent", "run"]
    assert agent.pid_file == tmp_path / "run" / "agent-node1.pid"
    assert set(controller.words) <= set(controller.arguments)
    assert set(agent.words) <= set(agent.arguments)


@pytest.mark.parametrize("root", [str(DEFAULT_STATE), "/var/tmp/other"])
def test_units_are_whole_and_name_each_other(root: str) -> None:
    state = State(Path(root))
    service = services.agent(state, SETTINGS.nodes[0])
    text = units.render(service.template, state, unit=service.name, command=service.arguments)
    assert "@" not in text
    lines = text.splitlines()
    assert f"ExecStart={shlex.join(service.arguments)}" in lines
    assert "KillMode=process" in lines and "Delegate=yes" in lines
    after = next(line for line in lines if line.startswith("After="))
    assert units.name(state, "controller") in after and units.name(state, "fabric") in after


def test_units_of_two_directories_do_not_meet() -> None:
    assert units.name(State(DEFAULT_STATE), "controller") == "vzfleet-controller.service"
    assert units.name(State(Path("/var/tmp/a")), "controller") != units.name(State(Path("/var/tmp/b")), "controller")


def test_a_service_without_systemd_is_started_logged_and_stopped(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.log.mkdir()
    pid_file = tmp_path / "sleeper.pid"
    service = services.Service(
        "sleeper", [sys.executable, "-c", WRITES_PID, str(pid_file)], (str(pid_file),), pid_file, ""
    )
    supervisor = services.OwnProcesses(state)
    assert not supervisor.running(service)
    supervisor.start(service)
    supervisor.start(service)
    assert supervisor.running(service)
    assert console.wait_until(lambda: processes.running(pid_file, str(pid_file)) is not None, 10)
    pid = int(pid_file.read_text())
    assert os.getsid(pid) == pid
    assert services.OwnProcesses(state).running(service)
    assert "begun" in supervisor.log(service)
    supervisor.stop(service)
    assert not supervisor.running(service)
    assert not Path(f"/proc/{pid}").exists()
