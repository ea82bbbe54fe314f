"""The run folder: what a run leaves behind, written so that a crash can cost one batch at most.

    config.yaml          the resolved options: ``klkit run config.yaml`` repeats the run
    env.json             versions, platform, dtypes, digests
    samples.jsonl        one line a string, appended as the run goes
    shards/00000.…       per-decision numbers of each finished batch, while the run lasts
    tensors.safetensors  the shards in one file, once the run is done
    tokens.json          readable text of the tokens that the page shows
    result.json          the result, versioned
    report.html          one self-contained page

A shard appears whole or not at all (written beside, then renamed), and a batch counts as done
exactly when its shard is there; everything else can be rebuilt from the shards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from klkit.estimators.statistics import TokenStatistics
from klkit.files import file_digest, write_atomically, write_text
from klkit.frames import frame
from klkit.report.shards import Batch, Shown, flatten, join_shards, read_column, read_shown, unflatten

CONFIG, RESULT, SAMPLES, TENSORS, TOKENS, ENV, REPORT, SHARDS = (
    "config.yaml",
    "result.json",
    "samples.jsonl",
    "tensors.safetensors",
    "tokens.json",
    "env.json",
    "report.html",
    "shards",
)
FROM_Q = "from_q"  # below a run of two directions: the strings of q
# Options that may differ between the first half of a run and its resumption: they change how the
# strings are computed or shown, never which strings they are.
FREE_ON_RESUME = frozenset({"batch_size", "unit", "out", "json", "resume", "method", "device", "group_column"}) | {
    *("candidates", "both", "cache", "cache_limit"),  # a comparison may get further candidates
}


class RunFolderError(ValueError):
    """A run folder cannot be used as asked: it is missing, corrupt, or belongs to another run."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a message that says what is safe and how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"expected to write into {path}, got: {error}. Every batch finished before this is kept whole; "
            f"make room and continue with --resume, or start anew in another --out"
        ) from error


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run on disk.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def create(
        cls, path: Path, config: Mapping[str, Any], env: Mapping[str, Any], *, resume: bool = False
    ) -> RunFolder:
        """Open a folder for a new run, or continue the run that lies there.

        Raises:
            RunFolderError: the folder holds another run, or is not a run folder, or cannot be written.
        """
        folder = cls(path)
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"expected a folder for --out, got the file {path}; choose another name")
        if resume and path.exists():
            if not folder.untouched():
                folder.check_same_run(config, env)
        elif path.exists() and any(path.iterdir()):
            raise RunFolderError(
                f"expected an empty or new folder for --out, got {path}, which holds files; "
                f"add --resume to continue the run that is there, or choose another folder"
            )
        with disk_errors(path):
            (path / SHARDS).mkdir(parents=True, exist_ok=True)
            # The options last: where they are, everything that resuming asks for is.
            write_text(path / ENV, json.dumps(dict(env), indent=2))
            write_text(path / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        return folder

    def untouched(self) -> bool:
        """Whether nothing is there but what a crash at the very beginning leaves."""
        started = any((self.path / SHARDS).glob("*"))
        return not started and all(x.name in (ENV, SHARDS) or x.suffix == ".part" for x in self.path.iterdir())

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of a finished run.

        Raises:
            RunFolderError: there is no finished run.
        """
        if not (path / RESULT).is_file():
            state = "an unfinished run; finish it with --resume" if (path / SHARDS).is_dir() else "no run at all"
            raise RunFolderError(f"expected a finished run with a {RESULT} in {path}, got {state}; check the path")
        return cls(path)

    def check_same_run(self, config: Mapping[str, Any], env: Mapping[str, Any]) -> None:
        """Refuse to resume a run whose options, models or prompts would give other strings or numbers."""
        before, past = self.config(), self.environment()
        changed = [
            what
            for what, key in (("models", "models"), ("prompts", "contexts"), ("files", "files"))
            if _plain(past.get(key)) != _plain(env.get(key))
        ]
        if changed:
            raise RunFolderError(
                f"expected the models and prompts that the run in {self.path} was started with, got other "
                f"{' and '.join(changed)} under the same names; restore them, or choose another --out"
            )
        differing = [
            f"{key}: {before.get(key)!r} then, {config.get(key)!r} now"
            for key in dict.fromkeys((*before, *config))
            if key not in FREE_ON_RESUME and before.get(key) != config.get(key)
        ]
        if differing:
            raise RunFolderError(
                f"expected the options that the run in {self.path} was started with, got "
                f"{'; '.join(differing)}; repeat the first command with --resume, or choose another --out"
            )

    def config(self) -> dict[str, Any]:
        """The resolved options of the run."""
        try:
            config = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunFolderError(
                f"expected a readable {CONFIG} in {self.path}, got: {error}; this folder cannot be resumed, "
                f"choose another"
            ) from error
        if not isinstance(config, dict):
            raise RunFolderError(
                f"expected options by name in {self.path / CONFIG}, got {type(config).__name__}; "
                f"this folder cannot be resumed, choose another"
            )
        return config

    def environment(self) -> dict[str, Any]:
        """What env.json recorded when the run was started."""
        try:
            return dict(json.loads((self.path / ENV).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"expected a readable {ENV} in {self.path}, got: {error}; this folder cannot be resumed, choose another"
            ) from error

    def result(self) -> dict[str, Any]:
        """The result of a finished run, as it was written."""
        try:
            return dict(json.loads((self.path / RESULT).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"expected a readable {RESULT} in {self.path}, got: {error}; repeat the run with "
                f"klkit run {self.path / CONFIG}"
            ) from error

    def append(self, index: int, batch: Batch, lines: Sequence[Mapping[str, Any]]) -> None:
        """Store batch number ``index`` and its readable lines."""
        with disk_errors(self.path):
            beside = self.path / SHARDS / f"{index:05d}.part"
            try:
                save_file(flatten(batch), beside)
                # The name carries a digest, so that a shard that rots is not read as numbers.
                os.replace(beside, self.path / SHARDS / f"{index:05d}-{file_digest(beside)}.safetensors")
            finally:
                beside.unlink(missing_ok=True)
            with (self.path / SAMPLES).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def shards(self) -> list[Path]:
        """The files of the batches that are done, in order.

        Raises:
            RunFolderError: one is missing in the middle.
        """
        paths = sorted((self.path / SHARDS).glob("[0-9]*-*.safetensors"))
        for position, path in enumerate(paths):
            if path.stem.split("-", 1)[0] != f"{position:05d}":
                raise RunFolderError(
                    f"expected shard {position:05d} in {self.path / SHARDS}, got {path.name} next; a batch is "
                    f"missing, so this run cannot be resumed: start again in another --out"
                )
        return paths

    def batches(self) -> Iterator[Batch]:
        """The batches that are done, one after the other; those of a finished run as one.

        Raises:
            RunFolderError: a shard is damaged, or one is missing in the middle.
        """
        if (self.path / RESULT).is_file():
            with self._readable_tensors():
                whole = unflatten(load_file(self.path / TENSORS))
            yield whole
            return
        for path in self.shards():
            try:
                if file_digest(path) != path.stem.split("-", 1)[1]:
                    raise ValueError("its content is not what was written")
                batch = unflatten(load_file(path))
            except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
                raise RunFolderError(
                    f"expected a readable shard {path}, got: {error}; delete this shard and the later ones, "
                    f"then continue with --resume"
                ) from error
            yield batch

    def rewrite_samples(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace samples.jsonl, when a crash left it out of step with the shards."""

        def write(beside: Path) -> None:
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

        with disk_errors(self.path):
            write_atomically(self.path / SAMPLES, write)

    def samples(self) -> Iterator[dict[str, Any]]:
        """The lines of samples.jsonl but for broken ones, such as a last line that a crash cut off."""
        path = self.path / SAMPLES
        if not path.exists():
            return
        # Bytes, since a crash may have cut a character in two; b"\n", since texts may hold Unicode's other line ends.
        with path.open("rb") as file:
            for line in file:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue  # whoever counts the lines finds one missing, wherever it stood
                yield found

    def finish(self, result: Mapping[str, Any], texts: Mapping[int, str]) -> None:
        """Write the tensors of all batches into one file, the tokens' texts and the result, and drop the shards."""
        with disk_errors(self.path):
            write_text(self.path / TOKENS, json.dumps({str(token): text for token, text in texts.items()}))
            write_atomically(self.path / TENSORS, lambda beside: join_shards(self.shards(), beside))
        self.rewrite(result)
        self.clear()

    def clear(self) -> None:
        """Drop the shards: what they hold was written elsewhere."""
        with disk_errors(self.path):
            shutil.rmtree(self.path / SHARDS, ignore_errors=True)

    def rewrite(self, result: Mapping[str, Any]) -> None:
        """Write the result of a finished run anew: with another unit or estimator of the headline, say."""
        with disk_errors(self.path):
            write_text(self.path / RESULT, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def tokens(self) -> dict[int, str]:
        """Readable text of the tokens that the page shows, by id."""
        path = self.path / TOKENS
        try:
            return {int(token): str(text) for token, text in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise RunFolderError(
                f"expected readable token texts in {path}, got: {error}; repeat the run with "
                f"klkit run {self.path / CONFIG}"
            ) from error

    def shown(self) -> Shown:
        """The strings of a finished run that its page shows token by token."""
        with self._readable_tensors():
            return read_shown(self.path / TENSORS)

    def column(self, name: str) -> Iterator[Tensor]:
        """One column of a finished run's numbers, such as ``"rows.kl"``, some at a time."""
        with self._readable_tensors():
            yield from read_column(self.path / TENSORS, name)

    def decisions(self) -> Any:
        """Every decision of a finished run as a pandas ``DataFrame``: see :func:`klkit.report.tables.decision_columns`.

        All of it is in memory then; :meth:`column` reads one column some at a time.

        Raises:
            RunFolderError: the run is not finished, damaged, or one of many models.
            ImportError: pandas is not installed.
        """
        from klkit.report.tables import decision_columns

        return frame(decision_columns(self._statistics(), self.roles()))

    def strings(self) -> Any:
        """Every string of a finished run as a pandas ``DataFrame``: see :func:`klkit.report.tables.string_columns`.

        Raises:
            RunFolderError: the run is not finished, damaged, or one of many models.
            ImportError: pandas is not installed.
        """
        from klkit.report.tables import string_columns

        return frame(string_columns(self._statistics(), self.roles(), self.samples()))

    def roles(self) -> tuple[str, str]:
        """The model that wrote the strings of a finished run, and the one it was compared with."""
        result = self.result()
        if "roles" not in result:
            raise RunFolderError(
                f"expected a run of one pair in {self.path}, got a {result.get('schema', 'file')} of many models; "
                f"choose one: klkit.read_run(folder, candidate=...)"
            )
        first, second = result["roles"]
        # The half of a symmetric divergence that the other model wrote carries the result of both halves.
        other = self.path.name == FROM_Q and result["headline"]["divergence"] in ("js", "jeffreys")
        return (second, first) if other else (first, second)

    def _statistics(self) -> TokenStatistics:
        self.roles()  # a comparison of many models has no numbers of its own
        return next(iter(RunFolder.open(self.path).batches())).statistics

    @contextmanager
    def _readable_tensors(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise RunFolderError(
                f"expected a readable {TENSORS} in {self.path}, got: {error}; repeat the run with "
                f"klkit run {self.path / CONFIG}"
            ) from error


def _plain(value: Any) -> Any:
    """``value`` as it reads after a trip through JSON."""
    return json.loads(json.dumps(value))
