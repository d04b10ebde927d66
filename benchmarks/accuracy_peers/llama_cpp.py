"""llama.cpp's types (ggml of llama-cpp-python), all layers of one type, with or without an importance matrix.

Its ready-made mixtures (Q4_K_M and the like) give some layers a wider type; here a type stands alone, as with
``llama-quantize --pure``. The importance of a column is the mean square of its input, as ``llama-imatrix`` has it.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int64, c_size_t, c_void_p

import torch
from torch import Tensor

from benchmarks.peers.ggml import Library, library

from . import Job, Quantized, TooNarrow, linears

PACKAGE = "llama-cpp-python"
TYPES = {
    "Q4_0": 2, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23,
}  # fmt: skip


class Traits(Structure):
    """The beginning of ggml's own description of a type."""

    _fields_ = (
        ("name", c_char_p), ("block", c_int64), ("interleave", c_int64), ("block_bytes", c_size_t),
        ("quantized", c_bool), ("to_float", ctypes.CFUNCTYPE(None, c_void_p, POINTER(c_float), c_int64)),
    )  # fmt: skip


def quantize(job: Job, kind: str, importance: bool) -> Quantized:
    lib = library()
    traits = Traits.from_address(lib.get_type_traits(TYPES[kind]))
    assert traits.name.decode().lower() == kind.lower()
    model = job.model()
    layers = linears(model)
    if any(m.in_features % traits.block for m in layers.values()):
        raise TooNarrow(f"columns must be a multiple of {traits.block}")
    squares = mean_squares(model, job.windows) if importance else {}
    tensors = {
        f"{name}.weight": rounded(lib, kind, traits, layer.weight.detach().contiguous(), squares.get(name))
        for name, layer in layers.items()
    }
    return Quantized(tensors, 8 * traits.block_bytes / traits.block)


def rounded(lib: Library, kind: str, traits: Traits, weight: Tensor, importance: Tensor | None) -> Tensor:
    """The weight [N, K] as it comes back from ggml's type."""
    rows, columns = weight.shape
    data = torch.empty(rows, lib.row_size(TYPES[kind], columns), dtype=torch.uint8)
    pointer = None if importance is None else importance.data_ptr()
    lib.quantize_chunk(TYPES[kind], weight.data_ptr(), data.data_ptr(), 0, rows, columns, pointer)
    out = torch.empty(rows, columns)
    traits.to_float(data.data_ptr(), ctypes.cast(out.data_ptr(), POINTER(c_float)), rows * columns)
    return out


@torch.no_grad()
def mean_squares(model: torch.nn.Module, windows: list[Tensor]) -> dict[str, Tensor]:
    """Mean square [K] of every input of every layer, over the calibration tokens."""
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.float().flatten(0, -2).square().sum(0)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
        for name, module in linears(model).items()
    ]
    for window in windows:
        model(window)
    for hook in hooks:
        hook.remove()
    tokens = sum(window.numel() for window in windows)
    return {name: (total / tokens).contiguous() for name, total in sums.items()}
