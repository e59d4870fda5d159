"""Names of files as text: for records, hashes and messages."""

import os


def printable(name: str) -> str:
    """A name as Unicode that can be shown and stored; bytes that are none become ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
