# Made by tools/make_sync.py from tuneproof/aio; change it there.
"""The client without `await`."""
