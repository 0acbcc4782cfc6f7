"""Alembic's entry: runs the migrations on the connection that `controller.store.schema` passes."""

from alembic import context

from controller.store.models import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
