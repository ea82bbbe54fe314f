"""The command line: parses, calls one verb, prints. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

OK, AUDIT_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 audit failed, 2 bad input, 130 interrupted."""
    from klkit.cli.app import app

    # No bars or notices of other libraries between klkit's own lines, unless the user asked for them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app(args=list(argv) if argv is not None else None, prog_name="klkit")
    except Exception as error:
        # ValueError and OSError mostly carry klkit's own messages; the rest comes from files, devices and libraries.
        if os.environ.get("KLKIT_TRACEBACK"):
            raise
        message = str(error) or type(error).__name__
        print(f"klkit: {message}", file=sys.stderr)
        if not isinstance(error, (ValueError, OSError)) and not message.startswith("expected"):
            print("klkit: set KLKIT_TRACEBACK=1 to see where this came from", file=sys.stderr)
        sys.exit(BAD_INPUT)
