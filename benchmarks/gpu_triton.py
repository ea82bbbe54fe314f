"""A hand-written Triton kernel of the row sums: the contestant of benchmarks/gpu.py, not part of klkit.

It enters the package if it beats what torch.compile makes of klkit.divergences.backends.graphs by more than 15 % on a
GPU. It has been checked under Triton's interpreter only (tests/test_gpu.py), never timed.

What it does that Inductor does not: each lane holds R contiguous tokens and sums of its own over all its tokens, so the
loop has no reduction across lanes and no barrier, and one rescaling per R tokens. Blocks are lanes here; what follows
from the sums of blocks is the package's (graphs.joined).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from klkit.divergences.backends import graphs

SUMS = 17


@triton.jit
def lane_sums(A, B, OUT, size, stride_a, stride_b, span, lanes, C: tl.constexpr, R: tl.constexpr):
    """Grid (rows, splits). OUT (17, rows, lanes), lanes = splits * C: what graphs.block_sums returns of a block."""
    LOG2E: tl.constexpr = 1.4426950408889634
    FLOOR: tl.constexpr = -1e18
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    A += row * stride_a
    B += row * stride_b
    begin = split * span
    end = tl.minimum(begin + span, size)
    offsets = tl.arange(0, C)[:, None] * R + tl.arange(0, R)[None, :]
    # The centre of a lane's log-ratios: of its first tokens, which stand for the rest. Large offsets between the two
    # rows cost digits here, which graphs.block_sums takes off first.
    inside = begin + offsets < end
    a = tl.maximum(tl.load(A + begin + offsets, mask=inside, other=FLOOR).to(tl.float32), FLOOR)
    b = tl.maximum(tl.load(B + begin + offsets, mask=inside, other=FLOOR).to(tl.float32), FLOOR)
    weight = tl.maximum((a - tl.max(a, 1)[:, None]) * 0.125 + 1, 0.0)
    weight = tl.where((a > FLOOR / 2) & (b > FLOOR / 2), weight * weight, 0.0)
    weight = weight * weight
    weight = weight * weight
    centre = tl.sum(weight * (b - a), 1) / (tl.sum(weight, 1) + 1e-30)
    zero = tl.zeros([C], tl.float32)
    top_a, top_b = zero + FLOOR, zero + FLOOR
    sa, sb, t, u, va, vb, fa, fb, far_a, far_b, qa, qd = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    least, most = zero + float("inf"), zero - float("inf")
    for start in range(begin, end, C * R):
        place = start + offsets
        inside = place < end
        a = tl.maximum(
            tl.load(A + place, mask=inside, other=FLOOR, eviction_policy="evict_first").to(tl.float32), FLOOR
        )
        b = tl.maximum(
            tl.load(B + place, mask=inside, other=FLOOR, eviction_policy="evict_first").to(tl.float32), FLOOR
        )
        new_a, new_b = tl.maximum(top_a, tl.max(a, 1)), tl.maximum(top_b, tl.max(b, 1))
        down_a, down_b = top_a - new_a, top_b - new_b
        scale_a, scale_b = tl.exp2(down_a * LOG2E), tl.exp2(down_b * LOG2E)
        x, y = a - new_a[:, None], b - new_b[:, None]
        d = tl.where(inside, (b - a) - centre[:, None], 0.0)
        ea, eb = tl.exp2(x * LOG2E), tl.exp2(y * LOG2E)
        # A lane all of whose tokens are excluded has weights of 1, and of 0 once lanes are joined.
        s = d * d
        even = (((s * (1 / 40320) + 1 / 720) * s + 1 / 24) * s + 1 / 2) * s
        odd = ((s * (1 / 5040) + 1 / 120) * s + 1 / 6) * s * d
        near = tl.abs(d) < 0.5
        ead, ebd, eax = ea * d, eb * d, ea * x
        qa = scale_a * (qa + down_a * (2 * va + down_a * sa)) + tl.sum(eax * x, 1)
        va = scale_a * (va + down_a * sa) + tl.sum(eax, 1)
        vb = scale_b * (vb + down_b * sb) + tl.sum(eb * y, 1)
        sa = scale_a * sa + tl.sum(ea, 1)
        sb = scale_b * sb + tl.sum(eb, 1)
        t = scale_a * t + tl.sum(ead, 1)
        u = scale_b * u + tl.sum(ebd, 1)
        fa = scale_a * fa + tl.sum(tl.where(near, ea * (even + odd), -ead), 1)
        fb = scale_b * fb + tl.sum(tl.where(near, eb * (even - odd), ebd), 1)
        far_a = scale_a * far_a + tl.sum(tl.where(near, 0.0, ea), 1)
        far_b = scale_b * far_b + tl.sum(tl.where(near, 0.0, eb), 1)
        qd = scale_a * qd + tl.sum(ead * d, 1)
        least, most = tl.minimum(least, tl.min(d, 1)), tl.maximum(most, tl.max(d, 1))
        top_a, top_b = new_a, new_b
    out = OUT + row * lanes + split * C + tl.arange(0, C)
    step = tl.num_programs(0).to(tl.int64) * lanes
    tl.store(out, top_a)
    tl.store(out + step, top_b)
    tl.store(out + 2 * step, centre)
    tl.store(out + 3 * step, sa)
    tl.store(out + 4 * step, sb)
    tl.store(out + 5 * step, t)
    tl.store(out + 6 * step, u)
    tl.store(out + 7 * step, va)
    tl.store(out + 8 * step, vb)
    tl.store(out + 9 * step, fa)
    tl.store(out + 10 * step, fb)
    tl.store(out + 11 * step, far_a)
    tl.store(out + 12 * step, far_b)
    tl.store(out + 13 * step, qa)
    tl.store(out + 14 * step, qd)
    tl.store(out + 15 * step, least)
    tl.store(out + 16 * step, most)


def joined(a: Tensor, b: Tensor, parts: Tensor, span: int, lanes: int, width: int) -> Tensor:
    """The table of row sums from those of lanes: ``lanes`` of ``width`` contiguous tokens to a stride of a split."""
    tops = []
    for x, best in ((a, parts[0]), (b, parts[1])):
        value, lane = best.max(1, keepdim=True)
        steps = torch.arange(0, span, lanes * width, device=x.device)[:, None] + torch.arange(width, device=x.device)
        columns = lane // lanes * span + lane % lanes * width + steps.reshape(1, -1)
        outside = columns >= x.shape[1]
        entries = x.gather(1, columns.clamp(max=x.shape[1] - 1)).masked_fill(outside, -torch.inf)
        tops.append((columns.gather(1, entries.argmax(1, keepdim=True)), value))
    return graphs.joined(b, parts, parts[2].double(), *tops)


def row_sums(a: Tensor, b: Tensor, *, splits: int = 1, lanes: int = 256, width: int = 16, warps: int = 8) -> Tensor:
    """The table of klkit.divergences.sums.RowSums, in one read; more splits for few rows."""
    rows, size = a.shape
    tile = lanes * width
    span = triton.cdiv(triton.cdiv(size, splits), tile) * tile
    splits = triton.cdiv(size, span)
    parts = torch.empty(SUMS, rows, splits * lanes, device=a.device)
    lane_sums[(rows, splits)](
        a, b, parts, size, a.stride(0), b.stride(0), span, splits * lanes, C=lanes, R=width, num_warps=warps
    )
    finish = joined if a.device.type == "cpu" else compiled_joined
    return finish(a, b, parts, span, lanes, width)


compiled_joined = torch.compile(joined, dynamic=True)
