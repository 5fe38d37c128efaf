"""Text as documents: one encoding, one kind of line end, no boilerplate around a book."""

import re

_HEADER_END = re.compile(
    r"^.*(?:\*{3} ?START OF TH\w+ PROJECT GUTENBERG|\*END\*? ?THE SMALL PRINT|END THE SMALL PRINT).*$",
    re.I | re.M,
)
_FOOTER = re.compile(
    r"^.*(?:\*{3} ?END OF TH\w+ PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg).*$", re.I | re.M
)


def to_text(data: bytes) -> str:
    """Decode UTF-8, or Latin-1 where it is not; no byte order mark, line ends as LF."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def books(text: str) -> list[str]:
    """The books of a text in Project Gutenberg's form, without headers and footers, in order.

    A file may hold several volumes, each with its own. Text without such marks is one book, as it is.
    """
    found: list[str] = []
    place = 0
    while (header := _HEADER_END.search(text, place)) or not found:  # what follows the last footer is licence
        start = header.end() if header else 0
        footer = _FOOTER.search(text, start)
        found.append(text[start : footer.start() if footer else None])
        place = footer.end() if footer else len(text)
    return [book.strip("\n") + "\n" for book in found if book.strip()]
