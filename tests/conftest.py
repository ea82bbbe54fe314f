"""Type and shape checks of every tensor argument, on for the whole suite; and commands run as a user would."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

hook = install_import_hook("klkit", "beartype.beartype")
hook.__enter__()

# What numba and torch.compile compile cannot be wrapped.
COMPILED = tuple(f"klkit.divergences.backends.{name}" for name in ("kernels", "heads", "lanes", "graphs"))
finder = sys.meta_path[0]
instruments = finder.should_instrument
finder.should_instrument = lambda name: instruments(name) and name not in COMPILED


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command in a folder of its own, and returns its exit code, what it printed, and what it complained of."""
    from klkit.cli import main

    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return command
