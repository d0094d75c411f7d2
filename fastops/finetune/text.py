"""Text that any terminal and any file can take: names of files need not be UTF-8, terminals neither."""

import codecs
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TextIO

ESCAPE = "fastops.escape"
"""An error handler: bytes of a file's name are written as they are, other characters escaped."""


def escape(error: UnicodeError) -> tuple[bytes, int]:
    """What ESCAPE does: surrogateescape first, else backslashreplace."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = [
        bytes([ord(c) - 0xDC00])
        if "\udc80" <= c <= "\udcff"
        else c.encode("ascii", "backslashreplace")
        for c in error.object[error.start : error.end]
    ]
    return b"".join(written), error.end


codecs.register_error(ESCAPE, escape)


def printable(name: str | PathLike[str]) -> str:
    """A name as valid Unicode on one line; what is not is escaped (\\xe9, \\n)."""
    text = str(name).encode("utf-8", ESCAPE).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def any_terminal() -> Iterator[None]:
    """A block in which print() never fails for a character that the terminal cannot show."""
    changed: list[tuple[TextIO, str]] = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and getattr(stream, "errors", ESCAPE) != ESCAPE:
            changed.append((stream, stream.errors or "strict"))
            stream.reconfigure(errors=ESCAPE)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for stream, errors in changed:
            stream.reconfigure(errors=errors)  # type: ignore[attr-defined]


def for_terminal(text: str) -> str:
    """The text for standard output: a table's signs in ASCII where the terminal has only that."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.replace("±", "+-").replace("…", "...")
    return text
