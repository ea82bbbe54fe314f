"""Files of llama.cpp's base logits, byte by byte from the format's description: no code of klkit's is used."""

import math
import struct

import numpy as np


def record(logits, pad=0):
    """One law, as the format's description has it: fp32 step, fp32 lowest, codes, and one more if they are odd."""
    f = np.float32
    z = [f(x) for x in logits]
    top = max(z)
    bottom = max(min(z), f(top - f(16)))
    total = math.fsum(math.exp(float(x - top)) for x in z)
    step = f(f(top - bottom) / f(65535))
    lowest = f(f(bottom - top) - f(math.log(total)))
    codes = [round(float(f(x - bottom) * (f(1) / step))) if step and x > bottom else 0 for x in z]
    codes += [pad] * (len(codes) % 2)
    return struct.pack(f"<2f{len(codes)}H", step, lowest, *codes)


def by_hand(path, windows, laws, *, pad=0, size=None):
    """A whole file: ``laws`` are the logits at every scored position, in order."""
    width = len(windows[0])
    head = struct.pack("<8s3i", b"_logits_", width, size or len(laws[0]), len(windows))
    ids = b"".join(struct.pack("<i", i) for window in windows for i in window)
    path.write_bytes(head + ids + b"".join(record(z, pad) for z in laws))
    return path
