"""Alembic's entry: one connection, batch mode for SQLite."""

from alembic import context

from service.db.engine import Database
from service.db.models import Base

url = context.config.get_main_option("sqlalchemy.url")
assert url is not None

database = Database(url)
with database.engine.execution_options(writes=True).connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        user_module_prefix="service.db.models.",
    )
    with context.begin_transaction():
        context.run_migrations()
database.close()
