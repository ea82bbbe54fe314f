"""Put the tables of benchmarks/results/*.json, and the machine they were measured on, into docs/performance.md.

python benchmarks/page.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from common import Table

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"


def described(machine: dict[str, object]) -> str:
    """The machine in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}; {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['system']}; "
        f"{machine['threads']} threads; {versions}."
    )


def filled(page: str, results: Path) -> str:
    """``page`` with what stands between ``<!-- NAME -->`` and ``<!-- end -->`` made anew from ``NAME.json``."""

    def block(match: re.Match[str]) -> str:
        name, file = match[1], results / f"{match[1]}.json"
        if not file.exists():
            return match[0]
        found = json.loads(file.read_text(encoding="utf-8"))
        tables = "\n\n".join(Table(**table).markdown() for table in found["tables"])
        load = found["machine"]["load"]
        note = (
            f"{found['rounds']} rounds; load of the machine when the run ended: {load}. {described(found['machine'])}"
        )
        return f"<!-- {name} -->\n\n{tables}\n\n{note}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, page, flags=re.S)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
