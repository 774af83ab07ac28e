"""`python -m dit_in_dit`."""

from dit_in_dit.cli import main

main()
