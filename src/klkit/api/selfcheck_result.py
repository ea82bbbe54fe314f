"""What a self-check found: a claim, a number, and whether it is what it should be."""

from __future__ import annotations

from dataclasses import dataclass

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, tried.

    Attributes:
        name: in a few words.
        claim: what has to hold.
        found: what was measured; None where nothing could be.
        tolerance: largest that ``found`` may be (smallest, where more is better); None where it is no such number.
        outcome: ``passed``, ``failed`` or ``not applicable``.
        note: what it means, or what to do.
    """

    name: str
    claim: str
    found: float | int | None
    tolerance: float | int | None
    outcome: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """All checks.

    Attributes:
        checks: in the order they were made.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return all(check.outcome != FAILED for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def rows(self) -> list[dict[str, str]]:
        """A row a check, for a table of 80 columns."""
        return [
            {
                "check": check.name,
                "found": "" if check.found is None else f"{check.found:.3g}",
                "allowed": "" if check.tolerance is None else f"{check.tolerance:.2g}",
                "outcome": check.outcome,
            }
            for check in self.checks
        ]

    def notes(self) -> list[str]:
        """What there is to say about checks, failed ones first."""
        told = [check for check in self.checks if check.outcome == FAILED]
        told += [check for check in self.checks if check.outcome != FAILED and check.note]
        return [f"{check.name}: {check.claim}" + (f"; {check.note}" if check.note else "") for check in told]


def outcome(holds: bool) -> str:
    """The word for it."""
    return PASSED if holds else FAILED
