"""`python -m infopro_fast` is the command `infopro-fast`."""

from .cli import main

main()
