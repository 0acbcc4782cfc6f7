"""Which tests of a parallel run stay on one worker."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/cluster/", "tests/lxc/test_fleet.py", "tests/lxc/test_travels.py")
"""Files, or folders of files, whose tests share what their module builds: once, when one worker has them all."""


class Scheduling(LoadScopeScheduling):
    """Hands out tests one by one, but those files whole. They come first, and what is last in order stays last."""

    def _split_scope(self, nodeid: str) -> str:
        """The unit that is handed out: pytest-xdist's way to say it, since its marks do not work with pytest 9.2."""
        file, _, _ = nodeid.partition("::")
        return file if file.startswith(TOGETHER) else nodeid
