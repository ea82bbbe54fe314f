"""What a finished run says of every decision and of every string, as columns of one length.

Columns are named after the models as the run calls them: a reverse run draws its strings from q, so there ``log_q`` is
of the model that wrote them. Everything is in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from klkit.estimators.statistics import TokenStatistics


def decision_columns(statistics: TokenStatistics, roles: Sequence[str]) -> dict[str, Any]:
    """One entry a decision, string by string.

    ``kl_nats`` is the divergence of the two next-token laws after this prefix, from the model that wrote the strings to
    the other; its sum over a string has the mean that the run estimates.

    Args:
        statistics: the numbers of the run.
        roles: the model that wrote the strings, and the other one.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
        >>> columns = decision_columns(score(p, q, x), ("p", "q"))
        >>> len(columns["kl_nats"]) == x.decisions, "entropy_q_nats" in columns
        (True, True)
    """
    (first, second), x, rows = roles, statistics.x, statistics.rows
    string = x.row()
    columns = {
        "string": string,
        "prompt": x.prompt[string],
        "cluster": x.cluster[string],
        "position": x.position(),
        "token": x.targets(),
        "kl_nats": rows.kl,
        "log_ratio_nats": statistics.log_ratio,
        f"log_{first}": rows.logp,
        f"log_{second}": rows.logq,
        "reverse_kl_nats": rows.reverse_kl,
        "total_variation": rows.total_variation,
        f"entropy_{first}_nats": rows.entropy_p,
        f"entropy_{second}_nats": rows.entropy_q,
        f"end_{first}": rows.end_p,
        f"end_{second}": rows.end_q,
        "end_kl_nats": rows.end_kl,
        f"top_{first}": rows.top_p,
        f"top_{second}": rows.top_q,
        "same_top": rows.same_top,
        "lost_mass": rows.lost,
    }
    if statistics.mixture is not None:
        columns["kl_to_mixture_nats"] = statistics.mixture
    return {name: values.numpy() for name, values in columns.items()}


def string_columns(
    statistics: TokenStatistics, roles: Sequence[str], lines: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """One entry a string: the sums over its decisions, and its text.

    Args:
        statistics: the numbers of the run.
        roles: the model that wrote the strings, and the other one.
        lines: of ``samples.jsonl``; where they are not as many as the strings, there is no text.
    """
    (first, second), strings = roles, statistics.strings()
    length = strings.lengths.double()
    columns: dict[str, Any] = {
        "prompt": strings.prompt,
        "cluster": strings.cluster,
        "finished": strings.finished,
        "tokens": strings.lengths,
        "kl_nats": strings.kl,
        "log_ratio_nats": strings.log_ratio,
        f"log_{first}": strings.logp,
        f"log_{second}": strings.logp - strings.log_ratio,
        "reverse_kl_nats": strings.reverse_kl,
        f"entropy_{first}_nats": strings.entropy_p,
        f"entropy_{second}_nats": strings.entropy_q,
        "total_variation_per_token": strings.total_variation / length,
        "same_top_share": strings.same_top / length,
        "infinite_decisions": strings.infinite,
    }
    columns = {"string": range(len(length)), **{name: values.numpy() for name, values in columns.items()}}
    texts = [line.get("text") for line in lines]
    return {**columns, "text": texts} if len(texts) == len(length) else columns
