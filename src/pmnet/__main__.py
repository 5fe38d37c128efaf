"""`python -m pmnet` is the `pmnet` command."""

from pmnet.cli import app

app()
