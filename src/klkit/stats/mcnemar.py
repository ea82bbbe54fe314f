"""Two models' right and wrong answers to the same questions."""

from __future__ import annotations


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of equal chances, from the questions that only one of two models gets right.

    Given ``n = b + c`` such questions, ``b`` is binomial with probability ½ if both models are right equally often:
    ``p = min(1, 2 Σ_{k ≤ min(b, c)} C(n, k) / 2ⁿ)``. Questions on which both agree say nothing.

    Args:
        only_first: questions that only the first model gets right, ``b``.
        only_second: questions that only the second gets right, ``c``.

    Raises:
        ValueError: a count is negative.

    Example:
        >>> mcnemar_p(1, 5), mcnemar_p(0, 0)
        (0.21875, 1.0)

    Source: Q. McNemar (1947), Note on the sampling error of the difference between correlated proportions or
    percentages, Psychometrika 12(2).
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"expected two counts of at least 0, got {only_first} and {only_second}; count questions")
    n, ways, term = only_first + only_second, 0, 1
    for k in range(min(only_first, only_second) + 1):
        ways += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * ways / (1 << n))  # whole numbers until here, so exact
