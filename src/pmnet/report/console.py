"""What commands print to: paths and strings of users are shown as they are, without markup or emoji."""

from rich.console import Console

out = Console(markup=False, emoji=False)
