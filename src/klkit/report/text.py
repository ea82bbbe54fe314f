"""Text of strangers, made safe to show: tokens may hold anything, terminal commands included."""

from __future__ import annotations

import unicodedata

SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍", " ": " "}
# Control, format (bidirectional overrides, zero-width), surrogate and private characters, odd line ends.
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def printable(text: str) -> str:
    r"""``text`` with every character that is not plainly visible replaced by a sign or its code.

    Example:
        >>> printable("a\nb\x1b[31m\u202e")
        'a↵b\\x1b[31m\\u202e'
    """
    return "".join(SIGNS[c] if c in SIGNS else _code(c) if unicodedata.category(c) in HIDDEN else c for c in text)


def _code(character: str) -> str:
    value = ord(character)
    return f"\\x{value:02x}" if value < 256 else f"\\u{value:04x}" if value < 65536 else f"\\U{value:08x}"
