"""The commands by room; `tuneproof.cli` puts them together."""
