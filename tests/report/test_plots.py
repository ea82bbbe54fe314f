"""Figures say what they show: quantity, direction, unit, and which row is the headline."""

import re

import pytest

from klkit.report.plots import BLUE, GREY, estimators_figure, position_figure, reward_kl_figure, strings_figure

STRINGS = {"edges": [0.0, 1.0, 2.0], "mc": [1, 2], "rb": [2, 1], "sd_mc": 0.5, "sd_rb": 0.4, "mean": 0.9}


def row(method, estimand="S", direction="KL(p‖q)", value=1.0):
    ci = {"lower": value - 0.1, "upper": value + 0.1}
    return {
        "method": method, "estimand": estimand, "direction": direction, "unit": "nats", "value": value, "ci": ci,
    }  # fmt: skip


def words(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def lines(svg, colour):
    """Interval lines of that colour."""
    return len(re.findall(rf'<path[^>]*style="fill: none; stroke: {colour.lower()}[^"]*stroke-linecap: round', svg))


@pytest.mark.parametrize(("estimand", "per"), [("S", "per response"), ("F", "per token"), ("R", "per token")])
def test_estimates_are_in_the_units_of_their_estimand(estimand, per):
    svg = estimators_figure({"headline": row("rb", estimand), "estimates": [row("rb", estimand)]})
    assert any(word.startswith(f"KL(p‖q), nats {per}") for word in words(svg))


def test_only_the_headlines_quantity_is_shown_and_one_row_is_marked():
    symmetric = "KL(p‖q) + KL(q‖p)"
    head = row("rb", direction=symmetric, value=2.0)
    rows = [row(m, direction=d) for d in (symmetric, "KL(p‖q)", "KL(q‖p)") for m in ("rb_cv", "rb", "mc")]
    svg = estimators_figure({"headline": head, "estimates": [*rows, row("rb", "R", direction=symmetric)]})
    assert [w for w in words(svg) if w in ("rb_cv", "rb", "mc")] == ["mc", "rb", "rb_cv"]
    assert (lines(svg, BLUE), lines(svg, GREY)) == (1, 2)


def test_positions_are_whole_numbers():
    parts = [{"start": i, "stop": i + 1, "kl": 0.1, "stderr": 0.01, "end_kl": 0.01} for i in range(3)]
    svg = position_figure(parts)
    assert {"1", "2", "3"} <= set(words(svg))
    assert not {"1.5", "2.5"} & set(words(svg))
    assert "position in the response" in words(svg)
    assert "position in the window" in words(position_figure(parts, counted="windows"))


def test_strings_are_called_what_they_are():
    assert {"nats per response", "responses"} <= set(words(strings_figure(STRINGS)))
    assert {"nats per window", "windows"} <= set(words(strings_figure(STRINGS, counted="windows")))


def test_reward_against_kl_is_drawn_with_and_without_what_is_possible():
    points = [
        {"step": i, "method": "rb_cv", "kl": i, "kl_lower": i - 0.5, "kl_upper": i + 0.5, "reward": 2 * i}
        | {"reward_lower": "nan", "reward_upper": "nan"}
        for i in range(3)
    ]
    alone, with_best = reward_kl_figure(points), reward_kl_figure(points, [(0.0, 0.5), (1.0, 3.0), (9.0, 9.0)])
    assert alone.startswith(b"\x89PNG")
    assert len(with_best) > len(alone)
    assert reward_kl_figure(points[:1]).startswith(b"\x89PNG")
