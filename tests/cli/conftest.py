"""What the tests of the command line share."""

import pytest

from klkit.cli import main


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """Runs a command, and returns its exit code, what it printed, and what it complained of."""

    def command(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return command
