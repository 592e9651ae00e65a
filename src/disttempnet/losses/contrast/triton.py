"""The contrast of blocks.py as two Triton kernels for NVIDIA GPUs: row statistics, and the gradient from the negatives.

Each program owns some rows and a share of the columns (`split`), forms blocks of similarities in registers and writes
only sums: nothing of size b × B exists. No atomics: the same input gives the same bits. Image and text anchors are
computed one after the other, 12·b·B·D FLOP a step.

Numerics: features are rounded to bf16 (8 bits of mantissa) before anything is computed. Of the rounded features the
products are exact and summed in float32, and everything that divides by τ, exp2 and all sums over columns are float32,
so the statistics are those of blocks.py to float32 accuracy. In the gradient the weights p_ij + p'_ji are rounded to
bf16 before they multiply the columns, a relative error of at most 2⁻⁹ a weight, summed in float32. Rounding the
features moves a similarity of D = 512 by about 1e-4: tests/losses/contrast/test_triton.py measures the effect on ℓ.

Shapes: b local rows, B columns, D width, S splits of the columns.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from disttempnet.losses.contrast.pairs import EXCLUDED, LOG2E, Anchors, BatchPairs

ROWS, COLUMNS, DEPTH = 64, 64, 64  # of a block of similarities; DEPTH: share of D that a product takes at a time
GRADIENT_WIDTH = 512  # of D whose sums one program keeps in registers; wider features are split over programs
MOST_SPLITS = 16
FIRST_WITH_BF16 = (8, 0)  # compute capability
PROGRAMS_A_PROCESSOR = 2


@triton.jit
def _similarities(
    rows, columns, row_ids, column_ids, r, c, b, B, D,
    EXCLUDE: tl.constexpr, NOTHING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return a block of s in float32; columns behind the last one, and those of the row's id, are NOTHING."""
    s = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = tl.load(rows + r[:, None] * D + d[None, :], mask=(r < b)[:, None] & (d < D)[None, :], other=0.0)
        y = tl.load(columns + c[:, None] * D + d[None, :], mask=(c < B)[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(x, tl.trans(y), s)
    counted = (c < B)[None, :] & (r < b)[:, None]
    if EXCLUDE:
        own = tl.load(row_ids + r, mask=r < b, other=0)
        other = tl.load(column_ids + c, mask=c < B, other=0)
        counted = counted & (own[:, None] != other[None, :])
    return tl.where(counted, s, NOTHING)


@triton.jit
def _statistics_kernel(
    rows, columns, row_ids, column_ids, slopes, largest_out, total_out, moment_out, b, B, D, share,
    EXCLUDE: tl.constexpr, NOTHING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store largest s, Σ exp2(e), Σ exp2(e) e over columns [split · share, + share), with e = (s − largest) · slope."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    split = tl.program_id(1)
    slope = tl.load(slopes + r, mask=r < b, other=1.0)
    largest = tl.full((ROWS,), NOTHING, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    moment = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(split * share, tl.minimum(B, (split + 1) * share), COLUMNS):
        c = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        s = _similarities(rows, columns, row_ids, column_ids, r, c, b, B, D, EXCLUDE, NOTHING, ROWS, COLUMNS, DEPTH)
        new = tl.maximum(largest, tl.max(s, axis=1))
        exponent = (s - new[:, None]) * slope[:, None]
        weight = tl.exp2(exponent)
        step = (largest - new) * slope
        factor = tl.exp2(step)
        moment = factor * (moment + step * total) + tl.sum(weight * exponent, axis=1)
        total = factor * total + tl.sum(weight, axis=1)
        largest = new
    place = split * b + r
    tl.store(largest_out + place, largest, mask=r < b)
    tl.store(total_out + place, total, mask=r < b)
    tl.store(moment_out + place, moment, mask=r < b)


@triton.jit
def _gradient_kernel(
    rows, columns, row_ids, column_ids, row_slopes, row_offsets, column_slopes, column_offsets, out, b, B, D, share,
    first_row,
    EXCLUDE: tl.constexpr, NOTHING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store WIDTH entries of Σ_j (exp2(s · row slope + row offset) + exp2(s · column slope + column offset)) column_j.

    The column of the row's own pair, first_row + r, is left out.
    """
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    split = tl.program_id(1)
    w = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    row_slope = tl.load(row_slopes + r, mask=r < b, other=0.0)
    row_offset = tl.load(row_offsets + r, mask=r < b, other=0.0)
    gradient = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(split * share, tl.minimum(B, (split + 1) * share), COLUMNS):
        c = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        s = _similarities(rows, columns, row_ids, column_ids, r, c, b, B, D, EXCLUDE, NOTHING, ROWS, COLUMNS, DEPTH)
        column_slope = tl.load(column_slopes + c, mask=c < B, other=0.0)
        column_offset = tl.load(column_offsets + c, mask=c < B, other=0.0)
        weight = tl.exp2(s * row_slope[:, None] + row_offset[:, None])
        weight += tl.exp2(s * column_slope[None, :] + column_offset[None, :])
        weight = tl.where((s == NOTHING) | (c[None, :] == first_row + r[:, None]), 0.0, weight)
        y = tl.load(columns + c[:, None] * D + w[None, :], mask=(c < B)[:, None] & (w < D)[None, :], other=0.0)
        gradient = tl.dot(weight.to(tl.bfloat16).to(y.dtype), y, gradient)
    place = out + (split * b + r)[:, None] * D + w[None, :]
    tl.store(place, gradient, mask=(r < b)[:, None] & (w < D)[None, :])


def unusable(features: Tensor) -> str:
    """Return the reason why the kernels cannot compute with these features; empty where they can."""
    if features.dtype == torch.float64:
        return "the kernels compute in float32, the features are float64"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not features.is_cuda or torch.version.hip:
        kind = "an AMD GPU" if features.is_cuda else features.device.type
        return f"the features are on {kind}, and the kernels need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(features.device)
    if capability < FIRST_WITH_BF16:
        return "the kernels multiply bf16, which a GPU of compute capability {}.{} cannot".format(*capability)
    return ""


def row_statistics(
    rows: Tensor, columns: Tensor, slope: Tensor, start: int, pairs: BatchPairs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return largest s, Σ exp2(e), Σ exp2(e) e of every row, each [b], with e = (s − largest) · slope.

    Args:
        rows, columns: features [b, D] of one modality and [n, D] of the other.
        slope: log2(e)/τ [b].
        start: row of the global batch that the first column is.
        pairs: which pairs count.
    """
    grid, share, splits = _grid(rows, columns)
    sums = [slope.new_empty(splits, len(rows)) for _ in range(3)]
    with torch.cuda.device_of(rows):  # Triton starts kernels on the current GPU, wherever the tensors are
        _statistics_kernel[grid](
            *_operands(rows, columns, start, pairs), slope.contiguous(), *sums, *_sizes(rows, columns), share,
            EXCLUDE=pairs.ids is not None, NOTHING=EXCLUDED, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
        )  # fmt: skip
    largest = sums[0].amax(0)
    step = (sums[0] - largest) * slope
    factor = step.exp2()
    total = (factor * sums[1]).sum(0)
    return largest, total, (factor * (sums[2] + step * sums[1])).sum(0)


def add_kernel_gradients(
    rows: Tensor,
    columns: Tensor,
    row_anchors: Anchors,
    column_anchors: Anchors,
    start: int,
    pairs: BatchPairs,
    result: Tensor,
) -> None:
    """Add Σ_j (p_ij + p'_ji) column_j without the row's own pair to `result` [b, D], float32.

    Args:
        rows, columns, start, pairs: as of `row_statistics`.
        row_anchors, column_anchors: of these rows and columns.
        result: changed in place.
    """
    (blocks, splits), share, _ = _grid(rows, columns)
    D = rows.shape[1]
    width = min(GRADIENT_WIDTH, triton.next_power_of_2(D))
    out = result.new_empty(splits, *rows.shape)
    anchors = [(LOG2E * part).contiguous() for part in (*row_anchors, *column_anchors)]
    with torch.cuda.device_of(rows):
        _gradient_kernel[(blocks, splits, triton.cdiv(D, width))](
            *_operands(rows, columns, start, pairs), *anchors, out, *_sizes(rows, columns), share,
            pairs.first_row - start,
            EXCLUDE=pairs.ids is not None, NOTHING=EXCLUDED, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
            WIDTH=max(width, 16), num_warps=8, num_stages=2,
        )  # fmt: skip
    result += out.sum(0)


def _grid(rows: Tensor, columns: Tensor) -> tuple[tuple[int, int], int, int]:
    """Return (blocks of rows, splits), columns a split (a multiple of COLUMNS), and splits.

    There are enough programs to fill the device.
    """
    processors = torch.cuda.get_device_properties(rows.device).multi_processor_count if rows.is_cuda else 1
    blocks, wide = triton.cdiv(len(rows), ROWS), triton.cdiv(len(columns), COLUMNS)
    wanted = triton.cdiv(PROGRAMS_A_PROCESSOR * processors, blocks)
    share = triton.cdiv(wide, min(wanted, MOST_SPLITS, wide)) * COLUMNS
    splits = triton.cdiv(len(columns), share)
    return (blocks, splits), share, splits


def _operands(rows: Tensor, columns: Tensor, start: int, pairs: BatchPairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features in bf16, and ids of rows and columns (empty where all columns count)."""
    ids = pairs.ids if pairs.ids is not None else torch.empty(0, dtype=torch.int64, device=rows.device)
    row_ids = ids[pairs.local] if pairs.ids is not None else ids
    features = [side.bfloat16().contiguous() for side in (rows, columns)]
    if not rows.is_cuda:  # Triton's interpreter multiplies bf16 as integers: pass the same numbers in float32
        features = [side.float() for side in features]
    return features[0], features[1], row_ids.contiguous(), ids[start : start + len(columns)].contiguous()


def _sizes(rows: Tensor, columns: Tensor) -> tuple[int, int, int]:
    return len(rows), len(columns), rows.shape[1]
