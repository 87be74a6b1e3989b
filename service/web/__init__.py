"""The web pages: static files that call the same HTTP API as everybody else."""
