"""Type and shape checks of every tensor argument, on for the whole suite."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

hook = install_import_hook("klkit", "beartype.beartype")
hook.__enter__()

# What numba and torch.compile compile cannot be wrapped.
COMPILED = tuple(f"klkit.divergences.backends.{name}" for name in ("kernels", "lanes", "graphs"))
finder = sys.meta_path[0]
instruments = finder.should_instrument
finder.should_instrument = lambda name: instruments(name) and name not in COMPILED
