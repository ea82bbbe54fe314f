"""A model of one's own: what klkit needs of it, and the laws that check it."""

import torch

import klkit
from klkit.models.base import Vocabulary
from klkit.models.ngram import ngram

TEXTS = ["the cat sat on the mat", "the dog sat on the cat", "a mat sat on the dog"]


class Smoothed:
    """A bigram model, and a trunk of one number a decision: the token just read."""

    name = "bigram"
    window = None
    width = 1
    dtype = torch.float64

    def __init__(self, logp, symbols):
        self.logp = logp  # (v, v): row = token just read
        self.vocabulary = Vocabulary((*symbols, "<end>"), ends=(len(symbols),))

    def context(self, prompt):
        return torch.tensor([self.vocabulary.ends[0]]) if prompt is None else prompt

    def pieces(self, tokens):
        return [self.vocabulary.tokens[t] + " " for t in tokens]

    def encode(self, x):
        row, column = x.predictors()
        return x.tokens[row, column].double()[:, None]

    def readout(self, h):
        return self.logp[h[:, 0].long()]

    def begin(self, contexts):
        last = torch.stack([c[-1] for c in contexts])
        return last, last.double()[:, None]

    def advance(self, state, tokens):
        return tokens, tokens.double()[:, None]

    def select(self, state, rows):
        return state[rows]

    def embedding(self):
        return None


generator = torch.Generator().manual_seed(0)
table = torch.randn(4, 4, dtype=torch.float64, generator=generator)
p = Smoothed(table.log_softmax(-1), ("a", "b", "c"))
q = Smoothed((0.5 * table).log_softmax(-1), ("a", "b", "c"))
klkit.check_laws(p)
print("the laws hold;", klkit.estimate(p, q, samples=200, max_tokens=100))

# An n-gram model fitted from text is exact as well.
one, two = ngram(TEXTS, order=2, words=True), ngram(TEXTS, order=1, words=True)
print(f"bigram against unigram of the same texts: {klkit.exact(one, two).value:.3f} nats per sentence")
