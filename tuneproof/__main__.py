"""`python -m tuneproof`: the command, where the shell does not find it by its name."""

from tuneproof.cli import main

main()
