"""The HTTP API, its state, and serving."""
