"""Natural English that every Python carries: the prose of the language reference behind ``help()``.

The text differs a little between Python releases, so the packaged weights record which one taught
them, and nothing outside the build reads this corpus.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

MAXIMUM_WORDS = 90
"""Longer paragraphs are cut between sentences: about 150 tokens of the docs tokenizer."""

_NOT_LIBRARY = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"})

_STRAIGHT = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "→": "->"})
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"A-Z])")


def paragraphs() -> dict[str, tuple[str, ...]]:
    """Prose paragraphs by topic, each once: no code, grammar productions, headings or tables.

    Example:
        >>> any(text.startswith("Assert statements are a convenient way") for text in paragraphs()["assert"])
        True
    """
    seen: set[str] = set()
    kept: dict[str, tuple[str, ...]] = {}
    for topic in sorted(topics):
        blocks = (_clean(block) for block in re.split(r"\n\s*\n", topics[topic]))
        texts = [text for block in blocks if _is_prose(block) for text in _cut(block)]
        kept[topic] = tuple(text for text in dict.fromkeys(texts) if text not in seen)
        seen.update(texts)
    return kept


def split(texts: list[str], share: float = 0.05) -> tuple[list[str], list[str]]:
    """Divide texts in (training, held out) by a digest of each text, whatever their order and number.

    Example:
        >>> training, held = split([str(i) for i in range(1000)])
        >>> len(training) + len(held), 20 < len(held) < 80
        (1000, True)
    """
    held = {text for text in texts if hashlib.sha256(text.encode()).digest()[0] < 256 * share}
    return [text for text in texts if text not in held], [text for text in texts if text in held]


def first_sentences(text: str, count: int) -> str:
    """The first ``count`` sentences of a paragraph.

    Example:
        >>> first_sentences("It is so. It was so. It will be.", 2)
        'It is so. It was so.'
    """
    return " ".join(_SENTENCE.split(text)[:count])


def _clean(block: str) -> str:
    text = " ".join(block.translate(_STRAIGHT).split())
    text = re.sub(r"^(\* |\d+\. |- )", "", text)
    text = re.sub(r"\s*\[\d+\]", "", text)  # footnote marks
    return re.sub(r"(?<![\w*])\*{1,2}([\w. -]+)\*{1,2}(?![\w*])", r"\1", text)  # emphasis


def _is_prose(text: str) -> bool:
    words = text.split()
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return (
        len(words) >= 6
        and (text[0].isupper() or text[0] == '"')
        and text[-1] in ".:"
        and letters > 0.85 * len(text)
        and not re.search(r"::=|>>>|==|\\|__\w+__\(.*\)$", text)
    )


def _cut(text: str) -> list[str]:
    parts: list[list[str]] = [[]]
    for sentence in _SENTENCE.split(text):
        if parts[-1] and sum(len(s.split()) for s in parts[-1]) + len(sentence.split()) > MAXIMUM_WORDS:
            parts.append([])
        parts[-1].append(sentence)
    return [" ".join(part) for part in parts]


def docstrings() -> tuple[str, ...]:
    """Prose paragraphs of the standard library's docstrings, each once, in the order of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, None] = {}
    for file in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY & set(file.relative_to(root).parts):
            continue
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                blocks = (_clean(block) for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""))
                texts.update(dict.fromkeys(text for block in blocks if _is_prose(block) for text in _cut(block)))
    return tuple(texts)
