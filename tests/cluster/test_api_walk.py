"""One walk through the API as the document describes it, on the fake driver over real sockets."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.cluster import BUSYBOX, cluster


async def test_create_start_show_stop_delete(tmp_path: Path) -> None:
    async with cluster(tmp_path) as fleet:
        body = {"hostname": "my-new-container", "config": {"limits.memory": "256MB"}, "source": BUSYBOX}
        await fleet.done("POST", "/1.0/vz/101", body)
        shown = await fleet.show("101")
        assert shown["hostname"] == "my-new-container" and shown["status"]["status"] == "Stopped"
        await fleet.done("PUT", "/1.0/vz/101/state", {"action": "start"})
        status = (await fleet.show("101"))["status"]
        assert (status["status"], status["status_code"]) == ("Running", 103)
        assert status["machine"][0]["memory"] == "256MB" and status["machine"][0]["ip_address"]
        await fleet.refused("DELETE", "/1.0/vz/101", None, 400)
        await fleet.done("PUT", "/1.0/vz/101/state", {"action": "stop", "force": True})
        await fleet.done("DELETE", "/1.0/vz/101")
        await fleet.refused("GET", "/1.0/vz/101", None, 404)
