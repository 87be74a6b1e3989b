"""The HTTP contract: routes, schemas, problems, auth."""
