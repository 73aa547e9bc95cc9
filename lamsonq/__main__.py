"""`python -m lamsonq` is the `lamsonq` script."""

from lamsonq.commands import main

main()
