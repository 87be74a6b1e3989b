"""Jobs, datasets, models and keys in a database: SQLite by default, PostgreSQL by URL."""
