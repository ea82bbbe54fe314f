"""What libraries' KL penalties optimise: the comparison as a test, with the numbers of our small model."""

from collections import Counter

import pytest

from klkit.objectives.presets import PRESETS, customised, described, table

# preset: target on the policy's own strings, relative error and cosine there, and on strings of an older policy
EXPECTED = {
    "klkit-off-policy": ("kl", 0.0, 1.000, 0.0, 1.000),
    "rb-token-ratio": ("kl", 0.0, 1.000, 0.156, 0.988),
    "klkit": ("kl", 0.0, 1.000, 0.259, 0.968),
    "kl-rb": ("kl", 0.0, 1.000, 0.291, 0.959),
    "verl-reward": ("kl", 0.0, 1.000, 0.377, 0.949),
    "openrlhf": ("kl", 0.0, 1.000, 0.377, 0.949),
    "trl-rloo": ("kl", 0.0, 1.000, 0.390, 0.948),
    "verl-k2": ("token_local", 0.693, 0.722, 0.628, 0.780),
    "verl-plus": ("token_local", 0.693, 0.722, 0.628, 0.780),
    "trl-grpo": ("token_local", 0.693, 0.722, 0.731, 0.685),
    "trl-distillation": ("token_local", 0.693, 0.722, 0.731, 0.685),
    "openrlhf-unbiased": ("token_local", 0.693, 0.722, 0.731, 0.685),
    "slime-unbiased": ("token_local", 0.693, 0.722, 0.731, 0.685),
    "nemo-rl": ("token_local", 0.693, 0.722, 0.731, 0.685),
    "open-instruct-3": ("token_local", 0.693, 0.722, 0.731, 0.685),
    "prime-rl": ("token_local", 0.693, 0.722, 0.731, 0.685),
    "rb-detached": (None, 0.747, 0.666, 0.694, 0.721),
    "skyrl-reward": (None, 0.773, 0.653, 0.698, 0.717),
    "trl-grpo-before-1.10": ("token_local_forward", 0.808, 0.611, 0.697, 0.717),
    "verl": ("token_local_forward", 0.808, 0.611, 0.697, 0.717),
    "skyrl": ("token_local_forward", 0.808, 0.611, 0.697, 0.717),
    "open-instruct": ("token_local_forward", 0.808, 0.611, 0.697, 0.717),
    "openrlhf-loss": (None, 1.000, 0.0, 0.885, 0.474),
    "slime": (None, 1.000, 0.0, 0.885, 0.474),
    "miles": (None, 1.000, 0.0, 1.001, -0.008),
    "verl-abs": (None, 2.782, 0.055, 2.491, 0.181),
}


@pytest.fixture(scope="module")
def rows():
    return {row.preset: row for row in table()}


def test_the_order_of_the_table(rows):
    """Right on both first, then what older strings cost; token-local forms; wrong ones; those of mean zero."""
    assert list(rows) == list(EXPECTED)
    assert set(rows) == set(PRESETS)


@pytest.mark.parametrize("preset", EXPECTED)
def test_each(rows, preset):
    target, error, cosine, error_off, cosine_off = EXPECTED[preset]
    on, off = rows[preset].on_policy, rows[preset].off_policy
    assert on.target == target
    assert on.agreement["kl"].relative_error == pytest.approx(error, abs=1e-3)
    assert on.agreement["kl"].cosine == pytest.approx(cosine, abs=1e-3)
    assert off.agreement["kl"].relative_error == pytest.approx(error_off, abs=1e-3)
    assert off.agreement["kl"].cosine == pytest.approx(cosine_off, abs=1e-3)
    assert on.vanishes == (preset in ("openrlhf-loss", "slime", "miles"))
    assert off.off_policy
    assert not on.off_policy


def test_only_prefix_weights_are_right_off_policy(rows):
    assert {name for name, row in rows.items() if row.off_policy.correct} == {"klkit-off-policy"}


def test_what_is_called_unbiased_is_so_token_by_token(rows):
    """Six libraries' corrections have one expected gradient, also off-policy: the token-local one."""
    corrected = ["trl-grpo", "slime-unbiased", "openrlhf-unbiased", "nemo-rl", "open-instruct-3", "prime-rl"]
    assert {rows[name].on_policy.target for name in corrected} == {"token_local"}
    assert {rows[name].off_policy.target for name in corrected} == {"token_local"}
    assert Counter(row.on_policy.target for row in rows.values()) == {
        "kl": 7,
        "token_local": 9,
        "token_local_forward": 4,
        None: 6,
    }


def test_variances(rows):
    """Full return above reward-to-go above the released form above the strictly-future one above the local part."""
    of = {name: row.on_policy.variance for name, row in rows.items()}
    assert of["trl-rloo"] > of["verl-reward"] > of["kl-rb"] > of["klkit"] > of["trl-distillation"]
    assert of["verl-reward"] / of["klkit"] == pytest.approx(4.7, abs=0.1)
    assert of["kl-rb"] / of["klkit"] == pytest.approx(1.7, abs=0.1)
    assert of["open-instruct-3"] > of["trl-grpo"]  # the same mean, with noise r_n s_n on top


def test_presets_by_name():
    assert customised("klkit", normalise="length").normalise == "length"
    assert described("trl-rloo")[1].formula == "L = sg(Σ_j u_j) Σ_n log p(y_n)"
    with pytest.raises(ValueError, match="expected a preset among klkit"):
        customised("ppo")
