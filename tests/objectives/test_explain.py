"""What libraries' KL penalties optimise: the table of our toy, as a test."""

import pytest

from klkit.objectives.explain import PRESETS, Penalty, customised, explain

ON_POLICY = {
    "klkit": "kl",
    "klkit-off-policy": "kl",
    "kl-rb": "kl",
    "trl-rloo": "kl",
    "verl-reward": "kl",
    "openrlhf": "kl",
    "trl-grpo": "token_local",
    "trl-distillation": "token_local",
    "verl-plus": "token_local",
    "openrlhf-unbiased": "token_local",
    "slime-unbiased": "token_local",
    "nemo-rl": "token_local",
    "prime-rl": "token_local",
    "trl-grpo-before-1.10": "token_local_forward",
    "verl": "token_local_forward",
    "skyrl": "token_local_forward",
    "open-instruct": "token_local_forward",
    "skyrl-reward": None,
    "openrlhf-loss": None,
    "slime": None,
    "miles": None,
}


def test_every_preset_is_in_the_table():
    assert set(ON_POLICY) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_on_policy(preset):
    report = explain(PRESETS[preset][1])
    assert report.target == ON_POLICY[preset]
    assert report.vanishes == (preset in ("openrlhf-loss", "slime", "miles"))


def test_off_policy_only_prefix_weights_are_right():
    right = {name for name, (_, penalty) in PRESETS.items() if explain(penalty, off_policy=True).correct}
    assert right == {"klkit-off-policy"}


def test_strictly_future_returns_vary_less_than_the_released_form():
    variance = {name: explain(PRESETS[name][1]).variance for name in ("klkit", "kl-rb", "trl-rloo", "openrlhf")}
    assert variance["klkit"] < variance["kl-rb"]
    assert variance["klkit"] < variance["openrlhf"] < variance["trl-rloo"]


def test_dividing_by_the_length_is_another_objective():
    report = explain(customised("klkit-off-policy", estimator="full", placement="loss", weight="none"))
    assert report.target == "token_local"
    assert explain(Penalty("full", "loss", normalise="length")).target is None


def test_formulas():
    assert PRESETS["klkit"][1].formula == "L = Σ_n [D_n + sg(Σ_{j>n} D_j) log p(y_n)]"
    assert PRESETS["trl-grpo"][1].formula == "L = Σ_n r_n (exp(−u_n) − 1 + u_n)"
    assert PRESETS["trl-rloo"][1].formula == "L = sg(Σ_j u_j) Σ_n log p(y_n)"
    assert PRESETS["verl-plus"][1].formula.endswith("with the gradient of ½ u_n²")


@pytest.mark.parametrize(("options", "message"), [
    ({"estimator": "k4"}, "expected estimator to be one of k1, k2, k3, abs, full, got 'k4'"),
    ({"estimator": "k1", "placement": "rb"}, "the estimator full with the placement rb"),
    ({"detach": False}, "detach=False with the placement reward only"),
    ({"placement": "reward", "gradient": "k2"}, "straight-through gradient in the loss only"),
])  # fmt: skip
def test_parts_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        Penalty(**options)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="expected a preset among klkit"):
        customised("ppo")
