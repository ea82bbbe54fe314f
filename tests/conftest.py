"""Type and shape checks of every tensor argument, on for the whole suite."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

hook = install_import_hook("klkit", "beartype.beartype")
hook.__enter__()
