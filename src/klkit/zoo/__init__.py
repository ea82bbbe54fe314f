"""Packaged tiny checkpoints in genuine Hugging Face format, and what they were learnt from.

``klkit:NAME`` stands for the folder ``weights/NAME``; :mod:`klkit.zoo.catalogue` lists the names.
"""
