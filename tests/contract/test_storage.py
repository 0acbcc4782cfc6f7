"""What every storage does: the same tests on btrfs (a loop pool, a pool that the host has) and on plain directories."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from agent.config import AgentConfig
from agent.storage import btrfs_ioctl as ioctl
from agent.storage import open_storage
from agent.storage.base import Storage
from agent.storage.loop import LoopPool
from common.errors import DriverFailed, NoSpace, Unsupported

MIB = 1024 * 1024
_BTRFS = pytest.param("btrfs", marks=pytest.mark.lxc)
_POOL = pytest.param("pool", marks=pytest.mark.lxc)


def _config(state: Path, storage: str) -> AgentConfig:
    return AgentConfig(state=state, node="test", storage=storage, pool_size=256 * MIB)  # type: ignore[arg-type]


@asynccontextmanager
async def _given_pool(tmp_path: Path) -> AsyncIterator[Path]:
    """A directory in a subvolume of a btrfs that the host has, with files that are not ours."""
    loop = LoopPool(tmp_path / "host.img", tmp_path / "host", 256 * MIB)
    await loop.mount()
    ioctl.create_subvolume(tmp_path / "host" / "home")
    given = tmp_path / "host" / "home" / "given"
    (given / "images").mkdir(parents=True)
    (given / "images" / "file").write_text("not ours")
    yield given
    assert {str(path.relative_to(given)) for path in given.rglob("*")} == {"images", "images/file"}
    await loop.unmount()
    loop.remove()


@pytest.fixture(params=["dir", _BTRFS, _POOL])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    if request.param != "dir" and (os.geteuid() != 0 or shutil.which("mkfs.btrfs") is None):
        reason = "btrfs needs root and btrfs-progs"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    async with AsyncExitStack() as stack:
        config = _config(tmp_path, "dir" if request.param == "dir" else "btrfs")
        if request.param == "pool":
            config = msgspec.structs.replace(config, pool=await stack.enter_async_context(_given_pool(tmp_path)))
        opened = await open_storage(config)
        yield opened
        await opened.shut_down()
        await opened.purge()
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


async def _volume(storage: Storage, name: str, text: str = "one") -> Path:
    staging = await storage.create()
    (staging / "rootfs").mkdir()
    (staging / "rootfs" / "file").write_text(text)
    await storage.commit(staging, name)
    return storage.path(name)


async def test_a_volume_is_seen_once_it_is_committed(storage: Storage) -> None:
    staging = await storage.create()
    assert storage.volumes("containers") == []
    await storage.commit(staging, "containers/a")
    assert storage.volumes("containers") == ["containers/a"]
    assert not staging.exists()


async def test_a_discarded_staging_volume_leaves_nothing(storage: Storage) -> None:
    staging = await storage.create()
    (staging / "file").write_text("x")
    await storage.discard(staging)
    await storage.discard(staging)
    assert not staging.exists()


async def test_a_clone_has_the_content_and_a_life_of_its_own(storage: Storage) -> None:
    source = await _volume(storage, "images/base")
    (source / "rootfs" / "link").symlink_to("/etc/passwd")
    os.link(source / "rootfs" / "file", source / "rootfs" / "hard")
    os.chown(source / "rootfs" / "file", os.getuid(), os.getgid())
    await storage.commit(await storage.clone("images/base"), "containers/a")
    copy = storage.path("containers/a") / "rootfs"
    (source / "rootfs" / "file").write_text("two")
    assert (copy / "file").read_text() == "one"
    assert (copy / "link").readlink() == Path("/etc/passwd")
    assert (copy / "hard").stat().st_ino == (copy / "file").stat().st_ino


async def test_a_clone_of_nothing_is_an_error_and_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(DriverFailed):
        await storage.clone("images/none")
    assert list((storage.root / "staging").iterdir()) == []


async def test_commit_replaces_a_volume_of_that_name(storage: Storage) -> None:
    await _volume(storage, "containers/a", "old")
    await _volume(storage, "containers/a", "new")
    assert (storage.path("containers/a") / "rootfs" / "file").read_text() == "new"
    assert list((storage.root / "staging").iterdir()) == []


async def test_delete_is_complete_and_can_be_repeated(storage: Storage) -> None:
    await _volume(storage, "snapshots/a/first")
    await storage.delete("snapshots/a/first")
    await storage.delete("snapshots/a/first")
    assert storage.volumes("snapshots/a") == []
    assert list((storage.root / "staging").iterdir()) == []
    assert not (storage.root / "snapshots" / "a").exists()


async def test_delete_follows_no_link(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "precious").write_text("x")
    volume = await _volume(storage, "containers/a")
    (volume / "rootfs" / "trap").symlink_to(outside)
    await storage.delete("containers/a")
    assert (outside / "precious").exists()


async def test_a_tree_of_any_depth_is_deleted(storage: Storage) -> None:
    volume = await _volume(storage, "containers/a")
    here = os.open(volume, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    await storage.delete("containers/a")
    assert storage.volumes("containers") == [] and list((storage.root / "staging").iterdir()) == []


async def test_rename_moves_a_volume_and_can_be_repeated(storage: Storage) -> None:
    await _volume(storage, "containers/a")
    await storage.rename("containers/a", "containers/b")
    await storage.rename("containers/a", "containers/b")
    assert storage.volumes("containers") == ["containers/b"]
    with pytest.raises(DriverFailed):
        await storage.rename("containers/none", "containers/c")


async def test_snapshots_move_with_their_directory(storage: Storage) -> None:
    await _volume(storage, "snapshots/a/first")
    await storage.rename("snapshots/a", "snapshots/b")
    assert storage.volumes("snapshots/b") == ["snapshots/b/first"]


async def test_opening_again_keeps_volumes_and_sweeps_staging(storage: Storage) -> None:
    await _volume(storage, "containers/a")
    leftover = await storage.create()
    await storage.open()
    assert storage.volumes("containers") == ["containers/a"]
    assert not leftover.exists()


async def test_what_a_transfer_keeps_goes_with_it(storage: Storage) -> None:
    await storage.commit(await storage.create(), "containers/1")
    (storage.path("containers/1") / "file").write_text("x")
    for volume in ("transfers/t", "transfers/t/sent"):
        await storage.commit(await storage.create(), volume)
    if storage.name == "btrfs":
        for _ in range(2):
            await storage.snapshot("containers/1", "transfers/t/sent/one")
        assert ioctl.subvolume_info(storage.path("transfers/t/sent/one")).read_only
        with pytest.raises(OSError, match="Read-only"):
            (storage.path("transfers/t/sent/one") / "file").write_text("y")
        assert storage.volumes("transfers/t/sent") == ["transfers/t/sent/one"]
    else:
        with pytest.raises(Unsupported):
            await storage.snapshot("containers/1", "transfers/t/sent/one")
    for _ in range(2):
        await storage.delete("transfers/t")
    assert (storage.volumes("transfers"), storage.volumes("containers")) == ([], ["containers/1"])


async def test_a_transfer_that_nobody_ended_is_swept_after_a_day(storage: Storage) -> None:
    for age, name in ((0, "new"), (25 * 3600, "old")):
        await storage.commit(await storage.create(), f"transfers/{name}")
        then = time.time() - age
        os.utime(storage.path(f"transfers/{name}"), (then, then))
    await storage.open()
    assert storage.volumes("transfers") == ["transfers/new"]


async def test_the_data_survive_a_shut_down(storage: Storage) -> None:
    await _volume(storage, "containers/a")
    await storage.shut_down()
    await storage.open()
    assert (storage.path("containers/a") / "rootfs" / "file").read_text() == "one"


async def test_the_pool_has_a_size(storage: Storage) -> None:
    size, free = storage.pool()
    assert 0 < free <= size


async def test_a_disk_limit_holds_or_is_refused(storage: Storage) -> None:
    volume = await _volume(storage, "containers/a")
    if not storage.disk_limits:
        with pytest.raises(Unsupported):
            await storage.set_limit("containers/a", 20 * MIB)
        await storage.set_limit("containers/a", None)
        assert storage.usage("containers/a") == (None, None)
        return
    await storage.set_limit("containers/a", 20 * MIB)
    with pytest.raises(OSError, match="quota"):
        _write(volume / "big", 40 * MIB)
    os.sync()
    used, limit = storage.usage("containers/a")
    assert used is not None
    assert 10 * MIB < used <= 20 * MIB
    assert limit == 20 * MIB
    await storage.set_limit("containers/a", None)
    _write(volume / "big", 40 * MIB)
    assert storage.usage("containers/a")[1] is None


@pytest.mark.parametrize("storage", [_BTRFS], indirect=True)
async def test_a_clone_of_a_full_volume_can_be_written(storage: Storage) -> None:
    volume = await _volume(storage, "containers/a")
    await storage.set_limit("containers/a", 10 * MIB)
    with pytest.raises(OSError, match="quota"):
        _write(volume / "big", 20 * MIB)
    clone = await storage.clone("containers/a")
    _write(clone / "note", MIB)
    await storage.commit(clone, "snapshots/a/first")
    assert storage.usage("snapshots/a/first")[1] is None
    assert storage.usage("containers/a")[1] == 10 * MIB


def _write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())


@pytest.mark.parametrize("storage", [_BTRFS], indirect=True)
async def test_nested_subvolumes_are_deleted_with_their_volume(storage: Storage) -> None:
    volume = await _volume(storage, "containers/a")
    (volume / "rootfs" / "dir").mkdir()
    inner = volume / "rootfs" / "dir" / "inner"
    ioctl.create_subvolume(inner)
    ioctl.create_subvolume(inner / "innermost")
    (inner / "innermost" / "file").write_text("x")
    ids = [ioctl.subvolume_id(path) for path in (volume, inner, inner / "innermost")]
    await storage.delete("containers/a")
    assert list((storage.root / "staging").iterdir()) == []
    assert len(set(ids)) == 3


@pytest.mark.parametrize("storage", [_BTRFS], indirect=True)
async def test_quota_groups_of_deleted_volumes_go(storage: Storage) -> None:
    volume = await _volume(storage, "containers/a")
    group = Path("/sys/fs/btrfs", ioctl.filesystem_id(volume), "qgroups", f"0_{ioctl.subvolume_id(volume)}")
    assert group.exists()
    await storage.delete("containers/a")
    # Mounting again cleans up at once what the kernel would do in its own time.
    await storage.shut_down()
    await storage.open()
    with ioctl.directory(storage.root) as pool:
        assert not group.exists() or ioctl.exists(pool, int(group.name[2:]))


@pytest.mark.parametrize("storage", [_BTRFS], indirect=True)
async def test_a_full_pool_is_no_space(storage: Storage) -> None:
    volume = await _volume(storage, "containers/a")
    with pytest.raises(OSError, match=r"space") as caught:
        _write(volume / "big", 512 * MIB)
    assert caught.value.errno == 28
    with pytest.raises(NoSpace):
        for _ in range(10000):
            await storage.create()


async def test_auto_takes_directories_where_btrfs_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    opened = await open_storage(_config(tmp_path, "auto"))
    assert opened.name == "dir"
    monkeypatch.undo()
    again = await open_storage(_config(tmp_path, "auto"))
    assert again.name == "dir", "a node keeps the storage that it began with"


async def test_a_pool_that_is_no_btrfs_is_refused(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    config = AgentConfig(state=tmp_path, node="test", pool=pool)
    with pytest.raises(DriverFailed, match="btrfs"):
        await open_storage(config)


async def test_a_pool_that_is_not_on_btrfs_is_refused_and_left_alone(tmp_path: Path) -> None:
    for given in (tmp_path, tmp_path / "none"):
        with pytest.raises(DriverFailed, match="cannot be used as btrfs"):
            await open_storage(msgspec.structs.replace(_config(tmp_path, "auto"), pool=given))
    assert list(tmp_path.iterdir()) == []
