"""`python -m controller run` on a state directory that is in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.instance import only_one
from controller.__main__ import main


def test_a_second_controller_of_one_state_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, pid_file = tmp_path / "controller", tmp_path / "controller.pid"
    assert main(["init", "--state", str(state), "--address", "127.0.0.1"]) == 0
    pid_file.write_text("1\n")
    with only_one(state / "controller.lock", "a controller"):
        assert main(["run", "--state", str(state), "--pid-file", str(pid_file)]) == 1
    assert "is running in" in capsys.readouterr().err
    # The file of the one that runs stays as it is.
    assert pid_file.read_text() == "1\n"


def test_a_state_that_was_never_made_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--state", str(tmp_path / "none")]) == 1
    assert "controller: " in capsys.readouterr().err
