"""``klkit import-llamacpp`` as a user sees it."""

import json

import pytest
import torch

from klkit.api.prompts import read_prompts
from klkit.caches.llamacpp_write import write_llamacpp
from klkit.models.spec import load

Q = "klkit:docs-int8"


@pytest.fixture
def path(tmp_path):
    model = load("klkit:docs")
    prompts = [text for text in read_prompts("klkit:docs").contents if isinstance(text, str)]
    ids = torch.cat([model.context(text) for text in prompts])
    write_llamacpp(tmp_path / "base.dat", model, ids[: 12 * 16].view(12, 16))
    return tmp_path / "base.dat"


def test_a_file_is_compared_and_printed(run, path):
    code, out, err = run("import-llamacpp", path, Q)
    assert code == 0, err
    text = " ".join(out.split())
    for part in ("KL(p‖q) =", "base.dat (llama.cpp base logits)", "mean KLD", "cut 16 nats below", "cannot be checked"):
        assert part in text
    assert max(map(len, out.splitlines())) <= 80


def test_json_and_a_folder(run, path, tmp_path):
    code, out, err = run("import-llamacpp", path, Q, "--json", "-", "--out", "run", "--first", "none", "--unit", "bits")
    assert code == 0, err
    assert json.loads(out) == json.loads((tmp_path / "run" / "result.json").read_text())
    assert json.loads(out)["settings"]["first"] is None


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("nowhere.dat", Q), "expected a file of base logits"),
        (("base.dat", "klkit:reviews"), "expected a model over the 1024 ids"),
        (("base.dat", Q, "--first", "bos"), "expected auto, none or an id"),
        (("base.dat", Q, "--unit", "bans"), "nats, bits"),
    ],
)
def test_bad_input_is_refused_in_a_line(run, path, arguments, what):
    code, _, err = run("import-llamacpp", *arguments)
    assert code == 2
    assert what in err
