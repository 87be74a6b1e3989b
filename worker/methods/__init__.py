"""The methods an experiment compares, each behind one Protocol."""
