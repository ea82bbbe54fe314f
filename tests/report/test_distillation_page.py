"""The page of a distillation run: the numbers of its folder, the label, and nothing from elsewhere."""

import json
import re

import pytest
import yaml

from klkit.report.distillation import COLUMNS, write_distillation_report
from klkit.report.distillation_plots import POINTS, evaluated_figure, loss_figure
from klkit.report.quantities import QUANTITIES
from klkit.report.record import RunFolderError

LABEL = "mean adaptive_kl of next-token laws along the given texts; the gradient is unbiased"


def evaluation(step, scale):
    found = {"step": step, "strings": 40, "prompts": 10, "notes": []}
    for i, name in enumerate(QUANTITIES):
        value = (i + 1) * scale
        found |= {
            name: value,
            f"{name}_stderr": 0.1 * value,
            f"{name}_lower": 0.8 * value,
            f"{name}_upper": 1.2 * value,
        }
    return found


def folder(path, *, evaluations=None, metrics=5, label=(LABEL,), **config):
    path.mkdir(exist_ok=True)
    options = {"student": "small", "teacher": "large", "cache": None, "recipe": {"seed": 3}, **config}
    (path / "config.yaml").write_text(yaml.safe_dump(options))
    (path / "env.json").write_text(json.dumps({"versions": {"klkit": "1"}, "digests": {}, "objective": list(label)}))
    steps = [{"step": i + 1, "loss": 1 / (i + 1), "learning_rate": 1e-3} for i in range(metrics)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    lines = [evaluation(0, 2.0), evaluation(5, 0.25)] if evaluations is None else evaluations
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_page_says_what_was_measured_and_optimised(tmp_path):
    path = write_distillation_report(folder(tmp_path / "run"))
    page = path.read_text()
    assert "KL(teacher‖student) = 0.25 <small>nats per response</small>" in page
    assert "95% interval 0.2 … 0.3. At step 0 it was 2 (1.6 … 2.4)." in page
    assert "40 responses of the teacher to 10 held-out prompts, at step 5" in page
    assert f"<strong>Optimised:</strong> {LABEL}" in page
    assert '<div class="label">' in page
    assert page.count("<svg") == 7
    assert all(quantity.words in page for quantity in QUANTITIES.values() if "'" not in quantity.words)
    assert all(f'<th class="n">{words}</th>' in page for words in COLUMNS.values())
    assert "&#34;seed&#34;: 3" in page or '"seed": 3' in page


def test_a_gradient_that_is_not_the_objectives_stands_out(tmp_path):
    label = ("KL(student‖teacher) of whole responses; the gradient is NOT that quantity's", "what is left out")
    page = write_distillation_report(folder(tmp_path / "run", label=label)).read_text()
    assert '<div class="label warn">' in page
    assert '<p class="note">what is left out</p>' in page


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    page = write_distillation_report(folder(tmp_path / "run", student="<script>alert(1)</script>")).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"""(?:src|href)=["']?(?!#)(?:https?:)?//""", re.sub(r"<svg.*?</svg>", "", page, flags=re.S))


def test_a_run_that_was_not_evaluated_says_so(tmp_path):
    page = write_distillation_report(folder(tmp_path / "run", evaluations=[])).read_text()
    assert "5 steps <small>and no evaluation" in page
    assert page.count("<svg") == 2


def test_a_run_that_was_only_begun_has_a_page(tmp_path):
    page = write_distillation_report(folder(tmp_path / "run", evaluations=[evaluation(0, 1.0)], metrics=0)).read_text()
    assert "KL(teacher‖student) = 1 " in page
    assert "At step 0 it was" not in page


def test_numbers_that_are_none_and_lines_that_were_cut_off_do_no_harm(tmp_path):
    line = evaluation(3, 1.0) | {"kl": "inf", "kl_lower": "inf", "kl_upper": "inf", "rouge_l_lower": "nan"}
    for name in list(line):
        if name.startswith(("text_", "rouge_l")):
            del line[name]  # as where no prompt has a response
    path = folder(tmp_path / "run", evaluations=[line])
    with (path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 4, "kl": 0.')
    page = write_distillation_report(path).read_text()
    assert "KL(teacher‖student) = ∞" in page
    assert "held-out text</figcaption>" not in page


def test_the_page_is_written_again_by_the_command(tmp_path, run):
    code, out, _ = run("report", folder(tmp_path / "run"))
    assert (code, out.strip()) == (0, str(tmp_path / "run" / "report.html"))
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"expected the folder of a distillation run, .* got .*FileNotFoundError"):
        write_distillation_report(tmp_path)
    path = folder(tmp_path / "run")
    (path / "env.json").write_text('{"versions": {}}')
    with pytest.raises(RunFolderError, match="KeyError: 'objective'"):
        write_distillation_report(path)


def test_long_runs_are_drawn_as_means_of_blocks():
    short, long = ([{"step": i, "loss": 1.0, "learning_rate": 1.0} for i in range(n)] for n in (POINTS, 50 * POINTS))
    assert len(loss_figure(long)) < 1.2 * len(loss_figure(short))
    assert evaluated_figure([{"step": 0}], [("absent", "", "#000000")], "") == ""
