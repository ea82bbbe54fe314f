"""The command line as a user meets it: results, exit codes, bad input without a traceback."""

import json
import re
import shutil
from pathlib import Path

import pytest

from klkit.models.spec import locate

PAIR = ["klkit:docs-tuned", "klkit:docs"]
SMALL = ["--samples", "64", "--max-tokens", "12"]


def test_estimate_prints_a_sentence_and_writes_a_run_folder(run):
    code, out, err = run("estimate", *PAIR, *SMALL, "--out", "run")
    assert code == 0, err
    text = re.sub(r"\s+", " ", out)
    assert re.search(r"KL\(p‖q\) = [\d.]+ nats per response, 95% interval [\d.]+ to [\d.]+ \(bootstrap-t", text)
    assert "rb_cv from 64 responses of p of at most 12 tokens" in text
    assert max(map(len, out.splitlines())) <= 80
    assert Path("run/report.html").stat().st_size > 10_000
    assert not [line for line in err.splitlines() if "strings" not in line]  # no other library's chatter


def test_json_to_standard_output_is_json_and_nothing_else(run):
    code, out, _ = run("estimate", *PAIR, *SMALL, "--out", "run", "--json", "-")
    assert code == 0
    assert json.loads(out) == json.loads(Path("run/result.json").read_text())


def test_run_repeats_to_the_last_digit(run):
    run("estimate", *PAIR, *SMALL, "--seed", "3", "--out", "one")
    code, _, err = run("run", "one/config.yaml", "--out", "two")
    assert code == 0, err
    one, two = (json.loads(Path(f"{name}/result.json").read_text()) for name in ("one", "two"))
    assert one["headline"] == two["headline"]
    assert one["estimates"] == two["estimates"]


def test_config_with_flags_that_win(run):
    Path("run.yaml").write_text("p: klkit:docs-tuned\nq: klkit:docs\nsamples: 64\nmax_tokens: 8\nseed: 1\n")
    code, out, err = run("estimate", "--config", "run.yaml", "--max-tokens", "6", "--out", "run", "--json", "-")
    assert code == 0, err
    settings = json.loads(out)["settings"]
    assert (settings["max_tokens"], settings["seed"], settings["samples"]) == (6, 1, 64)


def test_report_is_written_again(run):
    run("estimate", *PAIR, *SMALL, "--out", "run")
    before = Path("run/report.html").read_text()
    Path("run/report.html").unlink()
    code, out, _ = run("report", "run")
    assert code == 0
    assert out.strip() == "run/report.html"
    assert Path("run/report.html").read_text() == before


def test_models_and_help(run):
    assert "klkit:docs-tuned" in run("models")[1]
    code, out, _ = run("estimate", "--help")
    assert code == 0
    assert "Examples" in out
    for option in ("--prompts", "--samples", "--max-tokens", "--rtol", "--json", "--resume", "--config", "--seed"):
        assert option in out
    assert run("--version")[1].startswith("klkit 0.")


def test_fixed_text(run):
    Path("text.txt").write_text("The value of a name is looked up in the namespace of the module. " * 40)
    code, out, err = run("estimate", *PAIR, "--text", "text.txt", "--context", "64", "--out", "run")
    assert code == 0, err
    for row in ("mean", "median", "99 %", "99.9 %", "largest", "same top-1"):
        assert row in out
    assert "per token of this text" in re.sub(r"\s+", " ", out)


def permuted(folder):
    """klkit:docs with two token strings exchanged: same size, other meaning."""
    target = Path(folder)
    shutil.copytree(locate("klkit:docs"), target)
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    by_id = {i: t for t, i in vocabulary.items()}
    first, second = by_id[40], by_id[41]
    vocabulary[first], vocabulary[second] = 41, 40
    path.write_text(json.dumps(tokenizer))
    return str(target)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["klkit:docs-tuned"], "two models"),
        (["klkit:absent", "klkit:docs"], "klkit:docs"),
        (["./absent", "klkit:docs"], "not there"),
        (["klkit:docs-tuned,colour=red", "klkit:docs"], "dtype"),
        (["klkit:docs-tuned,dtype=int3", "klkit:docs"], "float32"),
        ([*PAIR, "--prompts", "absent.jsonl"], "nothing there"),
        ([*PAIR, "--prompts", "empty.txt"], "empty"),
        ([*PAIR, "--prompts", "broken.jsonl"], "line 2"),
        ([*PAIR, "--prompts", "long.txt"], "shorten"),
        ([*PAIR, "--samples", "0"], "at least 1"),
        ([*PAIR, "--max-tokens", "0"], "at least 1"),
        ([*PAIR, "--batch-size", "many"], "auto"),
        ([*PAIR, "--config", "unknown.yaml"], "did you mean 'samples'"),
        ([*PAIR, "--config", "absent.yaml"], "YAML"),
        ([*PAIR, "--config", "list.yaml"], "options by name"),
        ([*PAIR, "--resume"], "--out"),
        ([*PAIR, "--text", "absent.txt"], "nothing there"),
        (["klkit:reviews", "klkit:docs"], "id"),
        (["nobody/such-model-anywhere", "klkit:docs"], "HF_HUB_OFFLINE"),
    ],
)
def test_bad_input_is_answered_in_one_message_with_code_2(run, arguments, expected):
    Path("empty.txt").write_text("\n")
    Path("broken.jsonl").write_text('{"prompt": "ok"}\n{"prompt": \n')
    Path("long.txt").write_text("the name of the module " * 400)
    Path("unknown.yaml").write_text("sampels: 3\n")
    Path("list.yaml").write_text("- 1\n")
    code, out, err = run("estimate", *arguments)
    assert code == 2, (out, err)
    assert expected in err
    assert "Traceback" not in err
    assert err.count("klkit:") >= 1


def test_permuted_vocabulary_is_refused_by_id(run):
    code, _, err = run("estimate", "klkit:docs", permuted("permuted"), *SMALL)
    assert code == 2
    assert "40" in err


def test_weights_that_are_not_numbers(run):
    from safetensors.torch import load_file, save_file

    shutil.copytree(locate("klkit:docs"), "broken")
    weights = load_file("broken/model.safetensors")
    name = next(n for n in weights if n.endswith("ln_f.weight"))
    weights[name] = weights[name] * float("nan")
    save_file(weights, "broken/model.safetensors", metadata={"format": "pt"})
    code, _, err = run("estimate", "klkit:docs", "broken", *SMALL)
    assert code == 2
    assert "NaN" in err


def test_model_without_end_token(run):
    shutil.copytree(locate("klkit:docs"), "endless")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = Path("endless") / name
        if path.exists():
            content = json.loads(path.read_text())
            content = {k: v for k, v in content.items() if "eos" not in k}
            path.write_text(json.dumps(content))
    code, _, err = run("estimate", "endless", "klkit:docs", *SMALL)
    assert code == 2
    assert "end token" in err


def test_a_truncated_checkpoint(run):
    shutil.copytree(locate("klkit:docs"), "cut")
    path = Path("cut/model.safetensors")
    path.write_bytes(path.read_bytes()[:100_000])
    code, _, err = run("estimate", "cut", "klkit:docs", *SMALL)
    assert code == 2
    assert "Traceback" not in err


def test_json_that_cannot_be_written_does_not_hide_the_result(run):
    Path("file").write_text("in the way")
    code, out, err = run("estimate", *PAIR, *SMALL, "--out", "run", "--json", "file/result.json")
    assert code == 2
    assert "nats per response" in out.replace("\n", " ")
    assert "result.json of its folder" in err


def test_out_that_cannot_be_written(run):
    Path("file").write_text("in the way")
    code, _, err = run("estimate", *PAIR, *SMALL, "--out", "file/run")
    assert code == 2
    assert "--out" in err


def test_a_failed_audit_is_loud(run, monkeypatch):
    """Strings of a warmer p passed off as p's: the number is printed with the failure, and the exit code is 1."""
    import klkit.api.batches as batches
    from klkit.models.wrap import temperature

    real = batches.sample

    def warm(model, *arguments, **options):
        draw = real(temperature(model, 1.5), *arguments, **options)
        return draw

    monkeypatch.setattr(batches, "sample", warm)
    code, out, err = run("estimate", *PAIR, "--samples", "128", "--max-tokens", "24", "--out", "run")
    assert code == 1
    assert "do not use this number" in err
    assert "FAILED" in out
    assert "self-audit failed" in Path("run/report.html").read_text()


def test_interruption_says_how_to_go_on(run, monkeypatch):
    from klkit.cli.progress import Watcher

    def interrupt(self, state):
        self.last = state
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "observe", interrupt)
        code, _, err = run("estimate", *PAIR, *SMALL, "--batch-size", "16", "--out", "run")
    assert code == 130
    assert "16 strings are kept" in err
    command = next(line for line in err.splitlines() if "--resume" in line).split()
    code, _, err = run(*command[1:])
    assert code == 0, err
