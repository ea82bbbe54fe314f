"""The line that shows where a run stands: redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from klkit.report.text import clock

if TYPE_CHECKING:
    from klkit.api.strings import Progress

PLAIN_EVERY = 10.0  # seconds between plain lines
NATS_PER_BIT = 0.6931471805599453  # without NumPy, which importing results would bring


class Line:
    """A line on standard error that is drawn again and again: at once on a terminal, every few seconds elsewhere."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._live = sys.stderr.isatty()
        self._width = 0
        self._printed = float("-inf")

    def show(self, text: str) -> None:
        """Show ``text``, cut to 79 columns."""
        line, now = text[:79], time.monotonic()
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._stream.flush()
            self._width = len(line)
        elif now - self._printed >= PLAIN_EVERY:
            self._stream.write(line + "\n")
            self._stream.flush()
            self._printed = now

    def close(self) -> None:
        """End the live line."""
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


class Watcher:
    """Prints the progress of an estimate to standard error; usable as a context manager.

    Attributes:
        last: the latest state seen, or None.
    """

    def __init__(self, unit: str, symbol: str = "token") -> None:
        self.last: Progress | None = None
        self._unit = unit
        self._symbol = symbol
        self._line = Line()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def observe(self, state: Progress) -> None:
        """Show ``state``."""
        self.last = state
        self._line.show(self.line(state))

    def line(self, state: Progress) -> str:
        """One line of at most 79 columns."""
        scale = NATS_PER_BIT if self._unit == "bits" else 1.0
        rate = state.fresh / state.seconds if state.seconds > 0 else 0.0
        tokens = rate * state.tokens / max(state.strings, 1)
        left = (state.total - state.strings) / rate if rate > 0 else float("inf")
        error = "" if state.stderr != state.stderr else f" ± {state.stderr / scale:.2g}"
        text = (
            f"{state.strings}/{state.total} strings  KL {state.value / scale:.4g}{error} {self._unit}"
            f"  {tokens:,.0f} {self._symbol}s/s  {clock(left)} left"
        )
        return text[:79]

    def close(self) -> None:
        """End the live line."""
        self._line.close()
