"""The client as it is written; `tools/make_sync.py` turns it into the one without `await`."""
