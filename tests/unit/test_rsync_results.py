"""What rsync's end says: which complaints are none in an early round, and which error each of the others is."""

from __future__ import annotations

import pytest

from agent.drivers.lxc.transfers import rsync
from common.errors import DriverFailed, InvalidRequest, NoSpace, Unsupported

GONE = """file has vanished: "/data/root/a"
rsync warning: some files vanished before they could be transferred (code 24) at main.c(1338) [sender=3.2.7]
"""
CHANGED = """ERROR: root/log failed verification -- update discarded.
rsync error: some files/attrs were not transferred (see previous errors) (code 23) at main.c(1338) [sender=3.2.7]
"""
NODE = """rsync: [generator] mknod "/data/dev/sda\x1b" failed: Operation not permitted (1)
rsync error: some files/attrs were not transferred (see previous errors) (code 23) at main.c(865) [Receiver=3.2.7]
"""


@pytest.mark.parametrize(("errors", "harmless"), [(GONE, True), (CHANGED, True), (NODE, False), (NODE + GONE, False)])
def test_what_went_meanwhile_is_no_error(errors: str, harmless: bool) -> None:
    assert rsync._only_gone(errors) is harmless
    assert not rsync._only_gone("")


@pytest.mark.parametrize(
    ("code", "errors", "kind", "text"),
    [
        (23, NODE, InvalidRequest, r"device node.*: dev/sda\?"),
        (11, 'rsync: write failed on "/data/x": No space left on device (28)', NoSpace, "no room"),
        (11, 'rsync: write failed on "/data/x": Disk quota exceeded (122)', NoSpace, "no room"),
        (23, GONE, DriverFailed, "code 23"),
        (-9, "", DriverFailed, "code -9"),
    ],
)
def test_each_error_is_of_its_kind(code: int, errors: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        rsync._check(code, errors)
    rsync._check(0, "")


def test_a_node_without_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rsync.shutil, "which", lambda _name: None)
    with pytest.raises(Unsupported, match="apt install rsync"):
        rsync.require()
