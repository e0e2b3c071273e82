"""`python -m ftune` is the console script."""

from ftune.cli import main

main()
