"""``klkit compare`` from settings: everything that can be checked is, then models are loaded one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from klkit.api.candidates import Candidate
from klkit.api.compare import compare_models
from klkit.api.compare_settings import RECORDED, CompareSettings
from klkit.api.material import Observer
from klkit.api.prepare import load_wide, resolved
from klkit.api.prompts import read_documents, read_prompts
from klkit.api.settings import Settings
from klkit.caches.recorded import RecordedModel
from klkit.models.base import LanguageModel, VocabularyMismatch
from klkit.models.checkpoints import quiet, read_tokenizer
from klkit.models.family import Family, transformed_alone
from klkit.models.sizes import weight_size
from klkit.models.spec import ModelSpec, candidate_spec, locate, spec_with
from klkit.ranking import Ranking
from klkit.train.processes import open_processes

SHOWN_IDS = 3


def run_compare(
    settings: CompareSettings,
    *,
    out: Path | None = None,
    resume: bool = False,
    announce: Callable[[str], None] | None = None,
    observe: Observer | None = None,
) -> Ranking:
    """Carry out ``settings``: the whole of what ``klkit compare`` does.

    Args:
        out: run folder; None keeps nothing.
        resume: continue the run in ``out``; candidates that it does not have yet join it.
        announce: told how much room the run takes.
        observe: called after every batch.

    Raises:
        ValueError: options, files or models that cannot be used, each with what to do instead.
        OSError: a file or checkpoint that is not there.
    """
    common = resolved(settings.common)
    settings = replace(settings, common=common)
    prompts = read_prompts(common.prompts, common.column) if common.prompts is not None else None
    column = "text" if common.column == "prompt" else common.column
    documents = read_documents(common.text, column) if common.text else None
    defaults = defaults_of(common)
