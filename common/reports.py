"""What a node, its containers and its images are: the parts of which messages are made.

Sizes in bytes; what is not known is None.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Text = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(max_length=128)]
Key = Annotated[str, Meta(max_length=160)]
Share = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Record(Struct, frozen=True, omit_defaults=True):
    """A part of a message."""


class WireError(Record, frozen=True):
    """An error that crosses the wire: a code of `common.errors` and its text."""

    code: Name
    text: Text
    field: Text | None = None
    allowed: Text | None = None


class NodeFacts(Record, frozen=True):
    """What does not change while an agent runs. Memory and disk in bytes; `storage` is `btrfs` or `dir`.

    `id_map` is that of unprivileged containers (`1000000:65536`: first id, number of ids). `transfer_address` is where
    other nodes reach this one for a container's data (`tcp://HOST:PORT`), None when they cannot.
    """

    hostname: Name
    architecture: Name
    cpus: Count
    memory: Count
    disk: Count
    driver: Name
    driver_version: Name
    storage: Name
    kernel: Name
    cgroup: Name
    agent_version: Name
    subnet: Name | None = None
    capabilities: tuple[Name, ...] = ()
    id_map: Name | None = None
    transfer_address: Text | None = None


class NodeSample(Record, frozen=True):
    """A node's load. Bytes; `cpu_load` is a share of all CPUs over the last interval, 0 to 1."""

    memory_free: Count
    disk_free: Count
    cpu_load: Share | None
    load_average: tuple[float, float, float]
    uptime: float


class Address(Record, frozen=True):
    """An address of a container's interface; `family` is `inet` or `inet6`, `scope` LXD's global, local or link."""

    family: Name
    address: Name
    netmask: Name
    scope: Name


class Interface(Record, frozen=True):
    """A network interface inside a container with its counters since it started (bytes and packets)."""

    name: Name
    hwaddr: Name
    mtu: Count
    up: bool
    host_name: Name | None
    addresses: tuple[Address, ...]
    bytes_received: Count
    bytes_sent: Count
    packets_received: Count
    packets_sent: Count
    errors_received: Count = 0
    errors_sent: Count = 0
    dropped_received: Count = 0
    dropped_sent: Count = 0


class ContainerSample(Record, frozen=True):
    """A container's figures at one moment. None is "not known", never a made-up 0.

    Bytes; `cpu_time` in nanoseconds since its start; `cpu_load` is the share of the CPUs allotted to it, 0 to 1.
    """

    id: Name
    disk_limit: Count | None = None
    disk_usage: Count | None = None
    memory_limit: Count | None = None
    memory_usage: Count | None = None
    memory_reclaimable: Count | None = None
    memory_peak: Count | None = None
    swap_usage: Count | None = None
    cpu_time: Count | None = None
    cpu_load: Share | None = None
    processes: Count | None = None
    pid: Count | None = None
    started_at: float | None = None
    interfaces: tuple[Interface, ...] = ()


class SnapshotReport(Record, frozen=True):
    """A snapshot that exists on a node; `created_at` in seconds since 1970."""

    name: Name
    created_at: float


class Difference(Record, frozen=True):
    """What is not as it should be: a configuration key (`limits.memory`) or a line of LXC's own (`lxc.uts.name`).

    None: there is nothing of it, such as no limit.
    """

    key: Key
    expected: Text | None
    found: Text | None


class ContainerReport(Record, frozen=True):
    """A container that exists on a node. `generation` 0 means that no controller ever made it (unmanaged).

    `status` is a code of `common.states.Status`; `reason` says why when it is Error. `config` is what the node was told
    last, unless `bare`: then it was left out. `altered` is what is in force, or stands in the node's files, otherwise.
    """

    id: Name
    generation: Count
    status: int
    config: dict[Key, Text] = {}
    hostname: Text = ""
    reason: Text | None = None
    pid: Count | None = None
    snapshots: tuple[SnapshotReport, ...] = ()
    hwaddr: Name = ""
    altered: tuple[Difference, ...] = ()
    bare: bool = False


class ImageReport(Record, frozen=True):
    """An image that a node holds. `size` in bytes on the node; `mapped`: ready for containers with an id map."""

    fingerprint: Name
    size: Count
    mapped: bool = True


class ContainerSpec(Record, frozen=True):
    """All that a node must know to run a container. `hwaddr` is chosen by the controller and stays for life."""

    id: Name
    generation: Count
    hostname: Text
    hwaddr: Name
    config: dict[Key, Text]


class ImageSpec(Record, frozen=True):
    """An image to be on the node. `layout` is `unified` (LXD: metadata.yaml and rootfs/), `rootfs` or `split`.

    A split one (LXD's metadata archive, then the root file system's) has the latter at `offset`. `size` in bytes.
    `path` is below the controller's HTTPS address, `token` good for that file and this operation only.
    """

    fingerprint: Name
    layout: Name
    size: Count
    path: Text
    token: Text
    offset: Count = 0
