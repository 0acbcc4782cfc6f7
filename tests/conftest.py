"""For every test: the repository on the path, `--long`, what the machine lacks, tests that need it alone, leftovers."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.failure.report import print_summary  # noqa: E402
from tests.leftovers import SESSION_VARIABLE, Machine, new_things, processes_of  # noqa: E402

MACHINE_LOCK = Path(tempfile.gettempdir()) / "vzfleet-tests.lock"
LXC_PROGRAMS = ("lxc-start", "dnsmasq", "mkfs.btrfs", "busybox", "newuidmap", "ip")
before = pytest.StashKey[Machine]()
left = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long`: the tests marked `long` too, and longer random runs."""
    parser.addoption("--long", action="store_true", help="also run the tests that take many minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Mark this session in the environment, so that its processes can be told from all others."""
    config.addinivalue_line("markers", "long: takes many minutes; runs with --long only")
    os.environ.setdefault(SESSION_VARIABLE, uuid.uuid4().hex)
    if not _is_worker(config):
        config.stash[before] = Machine.now()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for, skip what this machine cannot run, put tests that need it alone last."""
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    lacks = missing_for_lxc()
    for item in items:
        if lacks and item.get_closest_marker("lxc"):
            item.add_marker(pytest.mark.skip(reason=f"real containers need {lacks}"))
    items.sort(key=lambda item: item.get_closest_marker("serial") is not None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep on one worker what shares a fleet, unless another way is asked for with --dist."""
    if config.getoption("dist") != "load":
        return None
    from tests.scheduling import Scheduling

    return Scheduling(config, log)


def missing_for_lxc() -> str:
    """What this machine lacks for real containers; empty when it can run them."""
    if os.geteuid() != 0:
        return "root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return ", ".join(program for program in LXC_PROGRAMS if not shutil.which(program, path=path))


@pytest.fixture
def long_run(request: pytest.FixtureRequest) -> bool:
    """Whether `--long` was given."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def passable_path(tmp_path: Path) -> Path:
    """`tmp_path` that containers' mapped roots can pass through all the way; pytest makes its own with mode 700."""
    for directory in (tmp_path, *tmp_path.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            directory.chmod(directory.stat().st_mode | stat.S_IXOTH)
    return tmp_path


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test marked `serial` have the machine for itself; the wait does not count as its time."""
    with _machine(exclusive=item.get_closest_marker("serial") is not None):
        return (yield)


@contextmanager
def _machine(exclusive: bool) -> Iterator[None]:
    descriptor = os.open(MACHINE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On CI a skipped test of real containers is a failure: it would prove nothing."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and item.get_closest_marker("lxc"):
        report.outcome = "failed"
        report.longrepr = f"skipped on CI: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Fail the session when it left anything behind."""
    yield
    if _is_worker(session.config) or session.config.option.collectonly:
        return
    processes = processes_of(os.environ[SESSION_VARIABLE])
    things = new_things(session.config.stash[before], Machine.now())
    session.config.stash[left] = processes + things
    # On a machine that others use too a new thing may be theirs; a process bears this session's mark.
    found = processes or (things and os.environ.get("CI") == "true")
    if found and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The counts of the tests of faults, and what was left behind."""
    if not _is_worker(config):
        print_summary(terminalreporter, keep=bool(config.getoption("--long")))
    for thing in config.stash.get(left, []):
        terminalreporter.write_line(f"LEFT BEHIND {thing}", red=True)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")
