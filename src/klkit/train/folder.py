"""The folder of a training run: its options, a line a step, its checkpoints.

config.yaml          the options
env.json             versions, and digests of models and data
metrics.jsonl        what each step measured
evaluations.jsonl    what held-out data showed along the way
checkpoints/         see klkit.train.checkpoints
reward_kl.png        reward against KL, of a policy
report.html          curves, of a student
teacher_text.jsonl   what the teacher wrote for a student
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from klkit.files import write_text
from klkit.report.record import RunFolderError
from klkit.results import jsonable
from klkit.train.checkpoints import checkpoints

CONFIG, ENV, METRICS, EVALUATIONS, CHECKPOINTS, FIGURE = (
    "config.yaml",
    "env.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "checkpoints",
    "reward_kl.png",
)
FREE_ON_RESUME = frozenset({"steps", "every", "keep", "device"})
"""Options that a resumed run may change: they say how long it runs and what is kept of it."""


@dataclass(frozen=True, slots=True)
class TrainingFolder:
    """A training run on disk.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        env: Mapping[str, Any],
        *,
        resume: bool = False,
        free: Collection[str] = FREE_ON_RESUME,
    ) -> TrainingFolder:
        """Open a folder for a new run, or the one of the run to be continued.

        Args:
            free: options that may differ from those of the run to be continued.

        Raises:
            RunFolderError: it holds something else, or a run with other options or models, or cannot be written.
        """
        folder, config = cls(path), json.loads(json.dumps(config))
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"expected a folder for --out, got the file {path}; choose another name")
        started = (path / CONFIG).is_file() and (path / METRICS).is_file()
        if path.exists() and any(path.iterdir()) and not (resume and started):
            what = "a training run" if started else "other files"
            todo = "add --resume to continue it, or choose another --out" if started else "choose another --out"
            raise RunFolderError(f"expected an empty or new folder for --out, got {path}, which holds {what}; {todo}")
        if resume and started:
            folder._require_same(config, env, free)
        try:
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            write_text(path / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            write_text(path / ENV, json.dumps(env, indent=2) + "\n")
            for name in (METRICS, EVALUATIONS):
                (path / name).touch()
        except OSError as error:
            raise RunFolderError(f"expected to write into {path}, got: {error}; choose another --out") from error
        return folder

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return checkpoints(self.path / CHECKPOINTS)

    def log(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl`` or ``evaluations.jsonl``."""
        plain = {key: jsonable(value) if isinstance(value, float) else value for key, value in line.items()}
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, allow_nan=False) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of such a file; one that a crash cut off is left out."""
        found = []
        for line in (self.path / name).read_text(encoding="utf-8").splitlines():
            try:
                found.append(dict(json.loads(line)))
            except ValueError:
                continue
        return found

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``: those steps are done again."""
        for name in (METRICS, EVALUATIONS):
            kept = [line for line in self.lines(name) if line["step"] <= step]
            write_text(self.path / name, "".join(json.dumps(line) + "\n" for line in kept))

    def _require_same(self, config: Mapping[str, Any], env: Mapping[str, Any], free: Collection[str]) -> None:
        try:
            before = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
            past = json.loads((self.path / ENV).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunFolderError(
                f"expected a readable {CONFIG} and {ENV} in {self.path}, got: {error}; start again in another --out"
            ) from error
        then, now = flat(before), flat(config)
        differing = [
            f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
            for name in dict.fromkeys((*then, *now))
            if name not in free and then.get(name) != now.get(name)
        ]
        if differing:
            raise RunFolderError(
                f"expected the options that the run in {self.path} was started with, got {'; '.join(differing)}; "
                f"repeat the first command with --resume, or choose another --out"
            )
        changed = [name for name, digest in env["digests"].items() if past["digests"].get(name) != digest]
        if changed:
            raise RunFolderError(
                f"expected the models and data that the run in {self.path} was started with, got other "
                f"{' and '.join(changed)} under the same names; restore them, or choose another --out"
            )


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of a nested mapping beside the others.

    Example:
        >>> flat({"steps": 3, "recipe": {"seed": 0}})
        {'steps': 3, 'recipe.seed': 0}
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        nested = isinstance(value, Mapping)
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if nested else {name: value}
    return found
