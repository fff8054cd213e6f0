"""`python -m davae` is the `davae` command."""

from davae.cli import main

main()
