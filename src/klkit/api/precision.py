"""Whether an interval is as narrow as was asked for, as a share of the estimate or in nats."""

from __future__ import annotations

from klkit.api.settings import Settings
from klkit.estimators import summarise
from klkit.estimators.tally import Tally


def narrow_enough(tally: Tally, settings: Settings) -> bool:
    """Whether the headline's interval is as narrow as ``rtol`` or ``halfwidth`` ask."""
    if not settings.watched or bool((tally.strings().infinite > 0).any()):
        return True  # infinite, whatever else is drawn
    estimate = summarise(settings.method, tally)
    interval = estimate.interval()
    half = (interval.upper - interval.lower) / 2
    if settings.rtol is not None:
        return half <= settings.rtol * abs(estimate.value)
    return settings.halfwidth is not None and half <= settings.halfwidth


def too_wide(settings: Settings, strings: int) -> str:
    """What to say where all strings were drawn, and the interval is wider than was asked for."""
    asked = f"rtol={settings.rtol:g}" if settings.rtol is not None else f"halfwidth={settings.halfwidth:g} nats"
    return f"the interval is still wider than {asked} allows: {strings} strings were the limit"
