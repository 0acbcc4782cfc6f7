"""The state directory of deploy/quickstart: whose it is, and who may pass through it."""

import stat
from pathlib import Path

import pytest

from deploy.lib.console import DeployError
from deploy.lib.state import Node, Settings, State, alone, check, load, prepare, save, write


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def use(state: State) -> None:
    """What a run does."""
    check(state)
    prepare(state)


def test_a_new_directory_can_be_passed_through(passable_path: Path) -> None:
    state = State(passable_path / "new" / "fleet")
    use(state)
    assert mode(state.root) == 0o711
    assert mode(passable_path / "new") == 0o711
    assert mode(state.root / "agents") == 0o711


def test_an_empty_directory_of_mode_700_is_taken_and_opened(passable_path: Path) -> None:
    state = State(passable_path / "fleet")
    state.root.mkdir(mode=0o700)
    use(state)
    assert mode(state.root) == 0o701


def test_our_own_directory_is_opened_again(passable_path: Path) -> None:
    state = State(passable_path / "fleet")
    use(state)
    save(state, Settings(port=1, agent_port=2))
    state.root.chmod(0o700)
    use(state)
    assert mode(state.root) == 0o701


def test_a_closed_directory_above_is_refused_with_the_reason(passable_path: Path) -> None:
    closed = passable_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(DeployError, match=r"closed has mode 700.*chmod o\+x"):
        use(State(closed / "fleet"))
    assert mode(closed) == 0o700
    assert not (closed / "fleet").exists()


def test_a_directory_with_other_files_is_refused_and_left_as_it_was(passable_path: Path) -> None:
    foreign = passable_path / "home"
    foreign.mkdir(mode=0o700)
    (foreign / "letter").write_text("mine")
    with pytest.raises(DeployError, match="holds files of something else"):
        use(State(foreign))
    assert mode(foreign) == 0o700
    assert [path.name for path in foreign.iterdir()] == ["letter"]


def test_a_file_in_the_way_is_refused(passable_path: Path) -> None:
    (passable_path / "file").write_text("")
    with pytest.raises(DeployError, match="is not a directory"):
        use(State(passable_path / "file" / "fleet"))


def test_settings_are_read_back(passable_path: Path) -> None:
    state = State(passable_path)
    settings = Settings(9443, 9444, (Node("node1", 1, True, "10.88.1.0/24"),), "10.87.1.0/24")
    assert load(state) is None
    save(state, settings)
    assert load(state) == settings


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"port": 1, "agent_port": 2, "nodes": [{"unknown": 1}]}'])
def test_damaged_settings_are_named(passable_path: Path, text: str) -> None:
    state = State(passable_path)
    state.settings_file.write_text(text)
    with pytest.raises(DeployError, match=r"quickstart\.json is damaged"):
        load(state)


def test_two_directories_have_different_tags_and_one_always_the_same(tmp_path: Path) -> None:
    assert State(tmp_path / "a").tag != State(tmp_path / "b").tag
    assert State(tmp_path / "a").tag == State(tmp_path / "a").tag
    assert len(State(tmp_path).tag) == 6


def test_a_secret_file_is_never_open_to_others(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("old")
    path.chmod(0o644)
    write(path, "secret", 0o600)
    assert (mode(path), path.read_text()) == (0o600, "secret")
    assert [left.name for left in tmp_path.iterdir()] == ["env"]


def test_only_one_run_works_on_a_directory(tmp_path: Path) -> None:
    with alone(State(tmp_path)), pytest.raises(DeployError, match="another quickstart"), alone(State(tmp_path)):
        pass
    with alone(State(tmp_path)):
        assert tmp_path.exists()
