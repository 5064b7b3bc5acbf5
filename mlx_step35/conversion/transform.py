"""Slices of a source tensor, and what each becomes: dequantise, add the norms' 1, cast, quantise.

A slice is a run of whole experts, or rows of one expert in multiples of the FP8 block, so that packing and
scaling never need a second slice. Reading happens ahead in a thread, which touches bytes only: an array must
be evaluated by the thread that made it.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from mlx_step35.checkpoint.headers import ITEM_BYTES, Entry
from mlx_step35.conversion.plan import FP8_BLOCK, Job
from mlx_step35.conversion.tensorfile import read_range
from mlx_step35.errors import CheckpointError
from mlx_step35.quantization import Quantization

# Elements, not bytes: 16 MB of bfloat16, and float32 intermediates of 32 MB.
SLICE_ELEMENTS = 8 << 20

DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True, slots=True)
class Slice:
    """Experts `first` to `first + count`, rows `row` to `row + rows` of each; a matrix is one expert."""

    first: int
    count: int
    row: int
    rows: int


def slices(shape: tuple[int, ...]) -> list[Slice]:
    """Cut a weight into contiguous pieces of about SLICE_ELEMENTS."""
    experts, rows, columns = _as_3d(shape)
    whole = SLICE_ELEMENTS // (rows * columns)
    if whole:
        return [Slice(first, min(whole, experts - first), 0, rows) for first in range(0, experts, whole)]
    step = max(SLICE_ELEMENTS // columns // FP8_BLOCK, 1) * FP8_BLOCK
    return [
        Slice(expert, 1, row, min(step, rows - row))
        for expert in range(experts)
        for row in range(0, rows, step)
    ]


def read_weight(job: Job, entries: Mapping[str, Entry]) -> Iterator[tuple[Slice, mx.array]]:
    """The weight, slice by slice, as floating-point arrays (experts, rows, columns) with the norms' 1 added.

    Raises CheckpointError naming the tensor when a value is not finite. What is yielded is lazy.
    """
    entry = entries[job.source]
    parts = [entry] + [entries[name] for name in job.beside]
    scale = _read_scale(job, entries[job.scale]) if job.scale else None
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for piece, following in _pairs(slices(job.weight.shape)):
            raw = ahead.result() if ahead else _read(job, parts, piece)
            ahead = reader.submit(_read, job, parts, following) if following else None
            arrays = [_array(data, part.dtype, piece) for data, part in zip(raw, parts, strict=True)]
            if job.packed is not None:
                yield piece, unpack(arrays, job.packed)
            elif scale is not None:
                yield piece, _scaled(mx.from_fp8(arrays[0], dtype=mx.float32), scale, piece)
            elif job.weight.kind == "norm" and job.is_original:
                # In bfloat16 the sum would round 1.001 to 1.
                yield piece, arrays[0].astype(mx.float32) + 1
            else:
                yield piece, arrays[0]


def pack(array: mx.array, job: Job, dtype: str) -> list[mx.array]:
    """A slice as the output tensors of its job hold it."""
    if job.weight.kind == "bias":
        return [array.astype(mx.float32)]
    # Quantised from the output's precision, like mlx-lm, so that equal recipes give equal bits.
    array = array.astype(DTYPES[dtype])
    choice = job.quantization
    if choice is None:
        return [array]
    return list(mx.quantize(array, group_size=choice.group_size, bits=choice.bits, mode=choice.mode))


def to_bytes(array: mx.array) -> memoryview:
    """Evaluate an array and give its bytes as the file format wants them."""
    mx.eval(array)
    # numpy has no bfloat16, and a 16-bit view costs nothing.
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return memoryview(np.ascontiguousarray(np.array(array, copy=False)).data).cast("B")


def _as_3d(shape: tuple[int, ...]) -> tuple[int, int, int]:
    *experts, rows, columns = (1, *shape) if len(shape) == 1 else shape
    return prod(experts), rows, columns


def _pairs(pieces: list[Slice]) -> Iterator[tuple[Slice, Slice | None]]:
    yield from zip(pieces, [*pieces[1:], None], strict=True)


def _read(job: Job, parts: list[Entry], piece: Slice) -> list[np.ndarray]:
    """The bytes of a slice from every tensor it consists of, checked for NaN and infinity."""
    _, total_rows, _ = _as_3d(job.weight.shape)
    read = []
    for part in parts:
        width = part.shape[-1] * ITEM_BYTES[part.dtype]
        start = (piece.first * total_rows + piece.row) * width
        length = piece.count * piece.rows * width
        data = read_range(part, start, length)
        if len(data) != length:
            raise CheckpointError(f"{part.path.name} ended while '{job.source}' was read")
        array = np.frombuffer(data, np.uint8)
        if not _is_finite(array, part.dtype):
            raise CheckpointError(f"'{job.source}' in {part.path.name} holds NaN or infinity")
        read.append(array)
    return read


# dtype -> unsigned view, mask, and the masked value that means NaN or infinity: all exponent bits set, and in
# FP8, which has no infinity, all other bits too.
_NOT_FINITE = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F8_E4M3": (np.uint8, 0x7F),
}


def _is_finite(data: np.ndarray, dtype: str) -> bool:
    if dtype not in _NOT_FINITE:
        return True
    view, mask = _NOT_FINITE[dtype]
    bits = data.view(view)
    return not bool(np.any((bits & view(mask)) == view(mask)))


def _array(data: np.ndarray, dtype: str, piece: Slice) -> mx.array:
    """Bytes as an array (experts, rows, columns); FP8 stays uint8."""
    if dtype in ("BF16", "F16"):
        array = mx.array(data.view(np.uint16)).view(DTYPES[dtype])
    elif dtype in ("F32", "U32"):
        array = mx.array(data.view(np.uint32)).view(DTYPES[dtype])
    else:
        array = mx.array(data)
    return array.reshape(piece.count, piece.rows, -1)


def unpack(arrays: list[mx.array], packed: Quantization) -> mx.array:
    """The weight of what MLX stores for a packed one: its words, scales and, in affine mode, biases."""
    weight, scales, *biases = arrays
    return mx.dequantize(
        weight,
        scales,
        biases[0] if biases else None,
        group_size=packed.group_size,
        bits=packed.bits,
        mode=packed.mode,
    )


def _read_scale(job: Job, entry: Entry) -> mx.array:
    """All scales of a weight, in float32, as (experts, block rows, block columns)."""
    data = np.frombuffer(read_range(entry, 0, entry.nbytes), np.uint8)
    if not _is_finite(data, entry.dtype):
        raise CheckpointError(f"'{job.scale}' holds NaN or infinity")
    flat = _array(data, entry.dtype, Slice(0, 1, 0, 1)).astype(mx.float32)
    experts, rows, columns = _as_3d(job.weight.shape)
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    if flat.size == experts * blocks[0] * blocks[1] and len(entry.shape) == len(job.weight.shape):
        return flat.reshape(experts, *blocks)
    return mx.broadcast_to(flat.reshape(-1, 1, 1), (experts, *blocks))


def _scaled(weight: mx.array, scale: mx.array, piece: Slice) -> mx.array:
    """Multiply every block by its scale; the last block of a row or column may be ragged."""
    first = piece.row // FP8_BLOCK
    last = -(-(piece.row + piece.rows) // FP8_BLOCK)
    blocks = scale[piece.first : piece.first + piece.count, first:last]
    full = mx.repeat(mx.repeat(blocks, FP8_BLOCK, axis=1), FP8_BLOCK, axis=2)
    return weight * full[:, : weight.shape[1], : weight.shape[2]]
