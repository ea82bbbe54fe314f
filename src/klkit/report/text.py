"""Text for people: that of strangers made safe, since tokens may hold anything, and durations as they are said."""

from __future__ import annotations

import math
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


def clock(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> clock(75.0), clock(4000.0)
        ('1m15s', '1h06m')
    """
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
