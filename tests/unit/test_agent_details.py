"""Small things of the agent: locks, mounts below a directory, addresses, command-line options, the log's fields."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from agent.__main__ import _parser
from agent.config import AgentConfig, encode, load
from agent.context import CommandFilter, current_command, current_request
from agent.https import check_path, check_token, split_api
from agent.link import Backoff
from agent.locks import KeyedLocks
from agent.teardown import mounts_below
from common.errors import InvalidRequest


async def test_locks_keep_order_and_forget_names() -> None:
    locks, order = KeyedLocks(), []

    async def work(number: int, *names: str) -> None:
        async with locks.hold(*names):
            order.append(number)
            await asyncio.sleep(0)
            assert order[-1] == number, "nobody else came in between"

    await asyncio.gather(*(work(number, "a", "b") if number % 2 else work(number, "b", "a") for number in range(20)))
    assert order == list(range(20))
    assert len(locks) == 0


async def test_a_cancelled_waiter_leaves_no_lock_behind() -> None:
    locks = KeyedLocks()
    async with locks.hold("a"):
        waiter = asyncio.create_task(locks.hold("a").__aenter__())
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
    assert len(locks) == 0
    async with locks.hold("a", "a"):
        assert len(locks) == 1


def test_mounts_below_a_directory_are_found(tmp_path: Path) -> None:
    odd = tmp_path / "with space"
    mountinfo = (
        f"36 35 98:0 / / rw - ext4 /dev/sda rw\n37 35 98:0 / {tmp_path}/pool rw - btrfs /dev/loop0 rw\n"
        f"38 35 98:0 / {str(odd).replace(' ', chr(92) + '040')} rw - tmpfs t rw\n"
        f"39 35 98:0 / {tmp_path}-other rw - tmpfs t rw\n"
    )
    assert mounts_below(tmp_path, mountinfo) == [f"{tmp_path}/pool", str(odd)]


def test_addresses() -> None:
    assert split_api("https://10.0.0.1:8443") == ("10.0.0.1", 8443)
    assert split_api("https://[fd00::1]:8443/") == ("fd00::1", 8443)
    assert split_api("https://host") == ("host", 443)
    for bad in ("http://host", "https://", "https://host:99999", "https://host/path", "https://a\n.b", "host", ""):
        with pytest.raises(InvalidRequest):
            split_api(bad)


@pytest.mark.parametrize("bad", ["", "x", "/a b", "/a\r\nHost: x", "/é", "/" + "a" * 3000])
def test_paths_that_could_end_a_request_line(bad: str) -> None:
    with pytest.raises(InvalidRequest):
        check_path(bad, "path")


@pytest.mark.parametrize("bad", ["", "a b", "a\r\nX: y", "é"])
def test_tokens_that_could_end_a_header(bad: str) -> None:
    with pytest.raises(InvalidRequest):
        check_token(bad, "token")


def test_waiting_grows_with_jitter_up_to_a_bound() -> None:
    backoff = Backoff(first=0.1, longest=5, unreachable=2)
    for failures in (1, 3, 10, 1000):
        delays = [backoff.delay(failures) for _ in range(50)]
        ceiling = min(2, 0.1 * 2 ** min(failures, 30))
        assert ceiling / 2 <= min(delays) < max(delays) <= ceiling


def test_who_is_refused_waits_longer() -> None:
    backoff = Backoff(first=0.1, longest=5, unreachable=2)
    for failures in (1, 3, 1000):
        delays = [backoff.delay(failures, refused=True) for _ in range(50)]
        ceiling = min(5, 0.1 * 2 ** min(failures + 5, 30))
        assert ceiling / 2 <= min(delays) < max(delays) <= ceiling


def test_settings_come_back_as_they_were_written(tmp_path: Path) -> None:
    config = AgentConfig(state=tmp_path, node="node1", pool=Path("/pool"), autostart_delay=None)
    file = tmp_path / "agent.json"
    file.write_text(encode(config))
    assert load(file) == config
    for bad in ('{"state": "/x"}', '{"state": 1, "node": "n"}', '{"state": "/x", "node": "n", "typo": 1}', "{"):
        file.write_text(bad)
        with pytest.raises(InvalidRequest):
            load(file)


def test_options_of_join() -> None:
    sizes = ["--pool-size", "5GB", "--subnet", "10.88.3.0/24", "--autostart-delay", "never"]
    names = ["--node", "node3", "--bridge", "br0", "--storage", "btrfs", "--cgroup", "vzfleet-node3"]
    options = _parser().parse_args(["join", "TOKEN", *sizes, *names])
    assert (options.pool_size, options.subnet, options.autostart_delay) == (5 * 10**9, "10.88.3.0/24", None)
    assert _parser().parse_args(["join", "T", "--autostart-delay", "2.5"]).autostart_delay == 2.5


@pytest.mark.parametrize(
    "option",
    [
        ("--pool-size", "lots"),
        ("--subnet", "10.88.3.1/24"),
        ("--subnet", "fd00::/64"),
        ("--autostart-delay", "-1"),
        ("--node", "Node_1"),
        ("--bridge", "a" * 16),
        ("--bridge", "../x"),
        ("--cgroup", "a/b"),
        ("--cgroup", ".."),
        ("--storage", "zfs"),
    ],
)
def test_wrong_options_are_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["join", "TOKEN", f"{option[0]}={option[1]}"])
    assert option[0] in capsys.readouterr().err


def test_logs_tell_command_and_request() -> None:
    record = logging.makeLogRecord({"msg": "x"})
    command, request = current_command.set("op/1/do"), current_request.set("req-7")
    try:
        assert CommandFilter().filter(record)
    finally:
        current_command.reset(command)
        current_request.reset(request)
    assert (vars(record)["command"], vars(record)["request"]) == ("op/1/do", "req-7")
    other = logging.makeLogRecord({"msg": "x"})
    assert CommandFilter().filter(other)
    assert "command" not in vars(other)
