"""Where images come from, how long they stay and who may have them; snapshots that expire"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("images", schema=None) as batch_op:
        batch_op.add_column(sa.Column("rootfs_offset", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("public", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch_op.add_column(sa.Column("auto_update", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch_op.add_column(sa.Column("cached", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch_op.add_column(sa.Column("origin", sa.JSON(), nullable=True))
        batch_op.add_column(sa.Column("expires_at", sa.String(length=32), nullable=True))
        batch_op.add_column(sa.Column("last_used_at", sa.String(length=32), nullable=True))
        batch_op.add_column(sa.Column("descriptions", sa.JSON(), nullable=True))
    op.execute("UPDATE images SET descriptions = '{}'")
    with op.batch_alter_table("images", schema=None) as batch_op:
        batch_op.alter_column("descriptions", existing_type=sa.JSON(), nullable=False)
    with op.batch_alter_table("snapshots", schema=None) as batch_op:
        batch_op.add_column(sa.Column("expires_at", sa.String(length=32), nullable=True))
        batch_op.add_column(sa.Column("scheduled", sa.Boolean(), server_default=sa.false(), nullable=False))
