"""The tables. The migrations in `migrations/` make them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
)

metadata = MetaData()

counters = Table(
    "counters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("public_key", String(40), nullable=False, unique=True),
    Column("added_at", String(32), nullable=False),
    Column("facts", JSON),
    Column("description", Text, nullable=False),
    Column("mode", String(16), nullable=False, server_default="active"),
    Column("fenced_at", String(32)),
    Column("fenced_by", String(64)),
)

containers = Table(
    "containers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("node", String(63), ForeignKey("nodes.name"), nullable=False, index=True),
    Column("generation", BigInteger, nullable=False),
    Column("hostname", String(64), nullable=False),
    Column("description", Text, nullable=False),
    Column("config", JSON, nullable=False),
    Column("image", JSON),
    Column("hwaddr", String(17), nullable=False, unique=True),
    Column("created_at", String(32), nullable=False),
    Column("phase", String(16), nullable=False),
    Column("operation", String(36)),
    Column("error", Text),
    Column("reserved_memory", BigInteger, nullable=False),
    Column("reserved_disk", BigInteger, nullable=False),
    Column("power", String(16)),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column(
        "container",
        String(64),
        ForeignKey("containers.id", ondelete="CASCADE", onupdate="CASCADE"),
        primary_key=True,
    ),
    Column("name", String(64), primary_key=True),
    Column("created_at", String(32), nullable=False),
    Column("config", JSON, nullable=False),
    Column("expires_at", String(32)),
    Column("scheduled", Boolean, nullable=False, server_default=false()),
)

operations = Table(
    "operations",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("kind", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("updated_at", String(32), nullable=False),
    Column("deadline_at", String(32), nullable=False),
    Column("containers", JSON, nullable=False),
    Column("node", String(63)),
    Column("requestor", JSON, nullable=False),
    Column("request", String(64), nullable=False),
    Column("parameters", JSON, nullable=False),
    Column("resources", JSON, nullable=False),
    Column("undoing", Boolean, nullable=False),
    Column("position", Integer, nullable=False),
    Column("outputs", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("error", JSON),
    Column("ended_at", String(32)),
    Index("operations_by_status", "status", "id"),
    Index("operations_by_end", "ended_at"),
)

operation_containers = Table(
    "operation_containers",
    metadata,
    Column("operation", String(36), ForeignKey("operations.id", ondelete="CASCADE"), primary_key=True),
    Column("container", String(64), primary_key=True, index=True),
)

images = Table(
    "images",
    metadata,
    Column("fingerprint", String(64), primary_key=True),
    Column("layout", String(16), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("properties", JSON, nullable=False),
    Column("aliases", JSON, nullable=False),
    Column("source", String(255), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("rootfs_offset", BigInteger, nullable=False, server_default="0"),
    Column("public", Boolean, nullable=False, server_default=false()),
    Column("auto_update", Boolean, nullable=False, server_default=false()),
    Column("cached", Boolean, nullable=False, server_default=false()),
    Column("origin", JSON),
    Column("expires_at", String(32)),
    Column("last_used_at", String(32)),
    Column("descriptions", JSON, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("created_at", String(32), nullable=False),
    Column("expires_at", String(32)),
)

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("node", String(63)),
    Column("expires_at", String(32), nullable=False),
    Column("used_by", String(40)),
)

last_samples = Table(
    "last_samples",
    metadata,
    Column("node", String(63), ForeignKey("nodes.name", ondelete="CASCADE"), primary_key=True),
    Column("received_at", String(32), nullable=False),
    Column("body", JSON, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),
    Column("type", String(16), nullable=False),
    Column("action", String(64), nullable=False),
    Column("source", String(255), nullable=False),
    Column("container", String(64)),
    Column("node", String(63)),
    Column("body", JSON, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("caller", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("created_at", String(32), nullable=False, index=True),
    Column("status", Integer, nullable=False),
    Column("location", Text),
    Column("body", Text, nullable=False),
)
