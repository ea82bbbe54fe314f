"""``klkit explain`` as a user meets it."""

import json

import pytest

from klkit.objectives.presets import PRESETS


def test_a_preset(run):
    code, out, _ = run("explain", "--preset", "trl-grpo")
    assert code == 0
    assert "L = Σ_n r_n (exp(−u_n) − 1 + u_n)" in out
    assert "∇L = Σ_n r_n u_n s_n" in out
    assert "u_n = log p(y_n) − log q(y_n)" in out
    assert "what a token does to later divergences is missing" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_parts_and_a_changed_preset(run):
    _, by_parts, _ = run("explain", "--estimator", "full", "--placement", "reward", "--no-detach", "--json")
    _, by_name, _ = run("explain", "--preset", "rb-detached", "--no-detach", "--json")
    one, other = json.loads(by_parts), json.loads(by_name)
    assert one["target"] == "kl"
    assert one | {"preset": "rb-detached"} == other


def test_off_policy(run):
    right, wrong = (
        json.loads(run("explain", "--preset", name, "--off-policy", "--json")[1])
        for name in ("klkit-off-policy", "klkit")
    )
    assert right["target"] == "kl"
    assert right["variance"] == right["variance_klkit"]
    assert wrong["target"] is None
    assert wrong["off_policy"]


def test_every_preset(run, monkeypatch):
    from klkit.objectives import presets

    few = {name: PRESETS[name] for name in ("slime", "klkit", "trl-grpo-before-1.10", "skyrl-reward")}
    monkeypatch.setattr(presets, "PRESETS", few)
    code, out, _ = run("explain", "--list")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[3:7]] == ["klkit", "skyrl-reward", "trl-grpo-before-1.10", "slime"]
    ends = ["KL(p‖q) of responses", "nothing known", "tokens only, KL(q‖p)", "nothing (mean zero)"]
    assert [line[54:].strip() for line in lines[3:7]] == ends
    records = json.loads(run("explain", "--list", "--json")[1])
    assert [record["preset"] for record in records] == ["klkit", "skyrl-reward", "trl-grpo-before-1.10", "slime"]
    assert records[0]["on_policy"]["agreement"]["kl"]["relative_error"] < 1e-9


@pytest.mark.parametrize(("arguments", "message"), [
    (["--estimator", "k9"], "expected estimator to be one of k1, k2, k3, abs, full, got 'k9'"),
    (["--preset", "ppo"], "expected a preset among klkit"),
    (["--preset", "klkit", "--estimator", "k1"], "use reward_to_go"),
    (["--list", "--off-policy"], "expected --list alone"),
])  # fmt: skip
def test_bad_input_ends_with_a_message(run, arguments, message):
    code, out, err = run("explain", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err
