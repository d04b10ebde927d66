"""The whole native surface: one line per op, the same as in csrc/torch, with the rules of its shapes.

``x`` is float32, bfloat16 or float16 of shape [..., in_features]; ``packed`` and what lies beside it are the tensors
that :mod:`hf_spqr.formats` writes; ``perm`` is int32 [in_features]; ``bias`` is [out_features] of the dtype of ``x``.
``group_size`` -1 is one group per row.

``quantize_activation`` gives what ``w_int8_linear`` takes: int8 code [..., in_features] in the stored order of
columns, float32 scale and int32 zero [..., 1]. ``dtype`` is that of the result and of ``bias``. ``act_bits`` promises
that codes lie in ``[-2 ** (act_bits - 1), 2 ** (act_bits - 1))``, so that a kernel may pack them.

``int8_activations`` allows a kernel to round ``x`` as :func:`hf_spqr.ops.reference.round_activations` does, where that
is faster; others compute as without it. The gradient is that of the exact op.

Ops raise on wrong dtypes, shapes and devices. They trust what only reading all of a tensor would show, the columns of
outliers and of ``perm``, and the zero points of whole rows, which have room for more than a code: what comes of wrong
ones is not defined, and not the same everywhere. Modules check these when they are loaded
(:func:`hf_spqr.formats.spqr.check_outliers`, :func:`hf_spqr.formats.columns.check_perm`,
:func:`hf_spqr.formats.affine.check_statistics`). On GPUs ops trust the numbers of ``outlier_row``, too.
"""

import torch

NAMESPACE = "hf_spqr"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of activations, results and dense weights."""

_SPQR = "Tensor packed, Tensor outlier_row, Tensor outlier, Tensor? perm"
_SPQR_LAYOUT = "int bits, int group_size, int stat_bits, int second_group"
_SHAPE = "int out_features, int in_features"
_AFFINE = "Tensor packed, Tensor? perm"
_AFFINE_LAYOUT = "int bits, int group_size, bool symmetric, bool scale_bf16"
_INT8 = "bool int8_activations=False"

SCHEMAS = {
    "spqr_linear": f"(Tensor x, {_SPQR}, Tensor? bias, int out_features, {_SPQR_LAYOUT}, {_INT8}) -> Tensor",
    "spqr_dequantize": f"({_SPQR}, {_SHAPE}, {_SPQR_LAYOUT}, ScalarType dtype) -> Tensor",
    "affine_linear": f"(Tensor x, {_AFFINE}, Tensor? bias, int out_features, {_AFFINE_LAYOUT}, {_INT8}) -> Tensor",
    "affine_dequantize": f"({_AFFINE}, {_SHAPE}, {_AFFINE_LAYOUT}, ScalarType dtype) -> Tensor",
    "quantize_activation": "(Tensor x, Tensor? perm, int bits, bool symmetric) -> (Tensor code, Tensor scale, "
    "Tensor zero)",
    "w_int8_linear": "(Tensor code, Tensor scale, Tensor zero, Tensor packed, Tensor? bias, int out_features, "
    f"{_AFFINE_LAYOUT}, ScalarType dtype, int act_bits=8) -> Tensor",
}
