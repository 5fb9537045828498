"""`python -m rankine`."""

from rankine.cli import main

main()
