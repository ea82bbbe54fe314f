"""Where the models that specs name lie: folders, packaged checkpoints, adapters and their bases."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

PACKAGED = "klkit:"
ADAPTER_FILE = "adapter_config.json"


def packaged_names() -> list[str]:
    """Names of the checkpoints that come with klkit, for specs ``klkit:NAME``."""
    root = resources.files("klkit").joinpath("zoo", "weights")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []


def locate(path: str) -> str:
    """A folder on this machine or an id on the Hub for what a spec names.

    Raises:
        ValueError: a packaged name is unknown.
        FileNotFoundError: ``path`` reads like a folder and there is none.
    """
    if path.startswith(PACKAGED):
        name = path.removeprefix(PACKAGED)
        if name not in packaged_names():
            raise ValueError(
                f"expected one of the packaged models {', '.join(PACKAGED + n for n in packaged_names()) or '(none)'}, "
                f"got {path!r}; choose one of these, or name a folder or a model of the Hub"
            )
        return str(resources.files("klkit").joinpath("zoo", "weights", name))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise FileNotFoundError(
            f"expected a folder with a checkpoint in Hugging Face format, got {path!r}, which is "
            f"{'a file' if folder.exists() else 'not there'}; check the path, seen from {Path.cwd().name or '/'}"
        )
    return path


def base_of_adapter(path: str) -> str | None:
    """The base model that an adapter's folder names; None if ``path`` is no such folder."""
    name = path.removeprefix(PACKAGED)
    folder = Path(locate(path) if path.startswith(PACKAGED) and name in packaged_names() else path).expanduser()
    if (folder / "config.json").is_file() or not (folder / ADAPTER_FILE).is_file():
        return None
    base: str | None = json.loads((folder / ADAPTER_FILE).read_text()).get("base_model_name_or_path")
    return base or None


def resolved(path: str) -> str:
    """One spelling of a folder's path; an id of the Hub as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path
