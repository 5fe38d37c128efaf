"""What commands print to: paths and strings of users are shown as they are, without markup, emoji or colours."""

from rich.console import Console

out = Console(markup=False, emoji=False, highlight=False)
