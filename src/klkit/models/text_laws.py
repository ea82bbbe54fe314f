"""Next-token laws of a model, conditional on tokens that stand for text or end it, in the order of their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from klkit.models.base import LanguageModel, read_rows
from klkit.models.byte_contexts import Tokens
from klkit.models.byte_trie import Array, Trie, log_sums, log_total
from klkit.models.hypotheses import Law
from klkit.models.token_bytes import token_bytes
from klkit.sequences import Sequences

TOGETHER = 256  # contexts that the model reads at once


class TextLaws:
    """The laws of one model.

    Args:
        model: the token-level model.

    Attributes:
        trie: its tokens by their bytes.
        silent: ids of tokens that neither stand for text nor end it.

    Raises:
        VocabularyMismatch: as :func:`klkit.models.token_bytes.token_bytes`.

    Example:
        >>> from klkit.models.automaton import coin
        >>> law = TextLaws(coin(end=0.25)).after([(1,)])[1,]
        >>> np.exp(law.tokens).round(6).tolist(), round(float(np.exp(law.end)), 6), law.excluded
        ([0.75], 0.25, 0.0)
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.trie = Trie(token_bytes(model))
        spoken = {*self.trie.ids.tolist(), *model.vocabulary.ends}
        self.silent = [i for i in range(model.vocabulary.size) if i not in spoken]

    def after(self, contexts: Sequence[Tokens]) -> dict[Tokens, Law]:
        """The law of the next token after each of the contexts, each asked for once.

        Raises:
            ValueError: a context too long for the model, or one after which only tokens without text are possible.
        """
        # Like lengths together: a batch is padded to its longest string.
        distinct = sorted(set(contexts), key=lambda context: (len(context), context))
        found: dict[Tokens, Law] = {}
        for i in range(0, len(distinct), TOGETHER):
            some = distinct[i : i + TOGETHER]
            # One decision a string, whatever is chosen there: the row that predicts it is what is wanted.
            chosen = torch.tensor(self.model.vocabulary.ends[:1])
            x = Sequences.pack([torch.tensor(context) for context in some], [chosen] * len(some))
            place = 0
            for rows in read_rows(self.model, self.model.encode(x)):
                block = rows.detach().double().cpu().numpy()
                found |= zip(some[place : place + len(block)], self._conditional(block), strict=True)
                place += len(block)
        return found

    def _conditional(self, rows: Array) -> list[Law]:
        """Rows over all tokens as laws over those that stand for text or end it."""
        tokens = rows[:, self.trie.ids]
        ends = log_total(rows[:, list(self.model.vocabulary.ends)])
        total = np.logaddexp(log_total(tokens), ends)
        if bool(np.isneginf(total).any()):
            raise ValueError(
                f"expected a token of text or an end to be possible at every decision, got one at which "
                f"{self.model.name} chooses among {len(self.silent)} tokens that stand for no text; it has no law over "
                f"texts"
            )
        excluded = np.exp(rows[:, self.silent]).sum(-1)
        tokens = tokens - total[:, None]
        ahead = log_sums(tokens, self.trie.root.starts)
        return [Law(*parts) for parts in zip(tokens, ahead, (ends - total).tolist(), excluded.tolist(), strict=True)]
