"""Root's right to the ids of containers, shared by the nodes of one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.drivers.lxc.ids import IdMap, allow, withdraw

IDS = IdMap(1_000_000, 65_536)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    found = tmp_path / "subuid", tmp_path / "subgid"
    for file in found:
        file.write_text("somebody:100000:65536\n")
    return found


def test_one_node_goes_without_the_other(files: tuple[Path, Path], tmp_path: Path) -> None:
    for mark in ("one", "two", "one"):
        allow(IDS, tmp_path / mark, files)
    withdraw(IDS, tmp_path / "one", files)
    withdraw(IDS, tmp_path / "one", files)
    assert files[0].read_text() == "somebody:100000:65536\nroot:1000000:65536\n"
    withdraw(IDS, tmp_path / "two", files)
    assert [file.read_text() for file in files] == ["somebody:100000:65536\n"] * 2


@pytest.mark.parametrize(("line", "added"), [("root:1:4000000000", False), ("0:1000000:65537", False),
                                             ("root:1000000:65535", True), ("root:1000001:65536", True),
                                             ("root:x:y", True), ("nonsense", True)])  # fmt: skip
def test_a_line_of_the_administrators_counts(line: str, added: bool, files: tuple[Path, Path], tmp_path: Path) -> None:
    for file in files:
        file.write_text(f"{line}\n")
    allow(IDS, tmp_path / "mark", files)
    assert (IDS.line in files[0].read_text().splitlines()) == added
    withdraw(IDS, tmp_path / "mark", files)
    assert [file.read_text() for file in files] == [f"{line}\n"] * 2


def test_missing_files_are_made(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    allow(IDS, tmp_path / "mark", (file,))
    assert file.read_text() == "root:1000000:65536\n"
