"""klkit: the Kullback-Leibler divergence between language models, measured right."""

__version__ = "0.1.0"
