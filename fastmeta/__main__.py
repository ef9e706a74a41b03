"""`python -m fastmeta`."""

from fastmeta.cli import main

main()
