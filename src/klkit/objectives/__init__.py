"""Losses on tensors: what is descended, and what its gradient is the gradient of. Models are never imported here."""
