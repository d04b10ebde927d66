"""The ops ``torch.ops.hf_spqr.*``: compiled where possible, plain PyTorch otherwise, one schema either way.

``COMPILED`` and ``COMPILED_CUDA`` say which compiled parts were loaded; ``WHY_NOT`` maps a missing part to the reason.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from hf_spqr.ops import autograd, grouped, reference
from hf_spqr.ops.integer import integer_linear as integer_linear
from hf_spqr.ops.schema import NAMESPACE, SCHEMAS

WHY_NOT: dict[str, str] = {}

# Devices for which the reference stands in when no kernel of ours was loaded.
_OTHER_DEVICES = ("CUDA", "XPU", "MPS")


def _load(name: str) -> bool:
    try:
        importlib.import_module(f"hf_spqr.{name}")
    except ImportError as error:  # not built, or built for another machine
        WHY_NOT[name] = str(error)
        return False
    return True


COMPILED = _load("_C")
if torch.version.cuda is None:
    WHY_NOT["_C_cuda"] = "this PyTorch was built without CUDA"
COMPILED_CUDA = COMPILED and torch.version.cuda is not None and _load("_C_cuda")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if not COMPILED:
        _library.define(_name + _schema)
    for _device in ("CPU", *_OTHER_DEVICES):
        if not (_device == "CPU" and COMPILED) and not (_device == "CUDA" and COMPILED_CUDA):
            _library.impl(_name, getattr(reference, _name), _device)
autograd.register(NAMESPACE)
grouped.register(_library, NAMESPACE)

spqr_linear = torch.ops.hf_spqr.spqr_linear.default
spqr_dequantize = torch.ops.hf_spqr.spqr_dequantize.default
affine_linear = torch.ops.hf_spqr.affine_linear.default
affine_dequantize = torch.ops.hf_spqr.affine_dequantize.default
quantize_activation = torch.ops.hf_spqr.quantize_activation.default
w_int8_linear = torch.ops.hf_spqr.w_int8_linear.default
spqr_grouped_linear = torch.ops.hf_spqr.spqr_grouped_linear.default
affine_grouped_linear = torch.ops.hf_spqr.affine_grouped_linear.default
integer_grouped_linear = torch.ops.hf_spqr.integer_grouped_linear.default


def call_linear(op: torch._ops.OpOverload, x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """``op(x, *arguments)``, where ``bias`` is among the arguments.

    Gradients are registered from Python and cost some 3 microseconds a call even where nobody asks for one; then this
    goes straight to the kernel.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wanted or torch.compiler.is_compiling():
        return op(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, *arguments)
