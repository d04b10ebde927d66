"""What every packed linear module has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_spqr import ops
from hf_spqr.errors import CheckpointError, UnsupportedLayerError
from hf_spqr.formats.columns import check_perm, nbytes
from hf_spqr.nn.dense import make_dense

if TYPE_CHECKING:
    from hf_spqr.nn.share import Share

Backend = Literal["auto", "reference", "int8_activations"]
Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor in a file."""


def wrong_columns(x: Tensor, in_features: int) -> ValueError:
    """For x that is not [..., in_features]; ops see that only where it changes the layout of the packed matrix."""
    return ValueError(f"x must have in_features={in_features} columns in its last dimension, got {list(x.shape)}")


class Checked(nn.Module):
    """A module of packed tensors, whose ``load_state_dict`` fails unless what it loads passes ``check``."""

    packed: Tensor

    def check(self) -> None:
        raise NotImplementedError

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: Any, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if errors or self.packed.is_meta:
            return
        try:
            self.check()
        except CheckpointError as error:
            errors.append(f"{prefix.removesuffix('.')}: {error}")


class PackedLinear(Checked):
    """``y = x W^T + b`` with W held packed, x [..., in_features] float32, bfloat16 or float16.

    The packed tensors are int32 or int64 parameters without gradient, named as in the file, so that moves between
    devices, offload and ``state_dict`` need nothing special and casts to another float dtype pass them by. ``weight``
    is an empty float parameter: it answers ``module.weight.dtype`` and ``.device``, and makes a load without this
    package fail on its shape instead of leaving random weights.
    """

    tensor_names: ClassVar[tuple[str, ...]]
    """Names of the packed tensors in the order of the op's arguments; ``perm`` may come besides."""
    linear: ClassVar[torch._ops.OpOverload]
    reference_linear: ClassVar[Callable[..., Tensor]]
    dequantize: ClassVar[torch._ops.OpOverload]
    reference_dequantize: ClassVar[Callable[..., Tensor]]
    layout: Any
    packed: Tensor
    perm: Tensor | None
    bias: Tensor | None
    share: Share | None = None
    """What this rank holds of the layer under tensor parallelism; None where it holds all of it."""

    _hf_quantized_needs_local_tp = True  # tensor parallel: run on this rank's plain tensors

    def __init__(
        self,
        layout: Any,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.layout = layout
        self._numbers = self.layout_numbers(layout)
        self.backend: Backend = backend
        self.replaces: type[nn.Module] = nn.Linear
        for name in (*self.tensor_names, "perm"):
            tensor = tensors[name] if name in self.tensor_names else tensors.get(name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        device = tensors[self.tensor_names[0]].device
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def empty(
        cls,
        layout: Any,
        specs: Mapping[str, Spec],
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> PackedLinear:
        """A module on the meta device for tensors of the given shapes, to be loaded into.

        Raises CheckpointError if a tensor is missing or does not fit the layout.
        """
        for name in cls.tensor_names:
            if name not in specs:
                raise CheckpointError(f"the checkpoint has no tensor {name!r} for a packed layer; it is incomplete")
        shape, kind = specs["packed"]
        if tuple(shape) != layout.packed_shape() or kind != torch.int32:
            raise CheckpointError(
                f"'packed' should be torch.int32 {list(layout.packed_shape())} for {layout}, "
                f"the checkpoint has {kind} {list(shape)}"
            )
        tensors = {name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in specs.items()}
        return cls(layout, tensors, bias, dtype, backend)

    def hold(self, share: Share) -> None:
        """Become what one rank holds of the layer. To be called on the meta device, before the tensors are loaded."""
        self.share, self.layout = share, share.layout
        self.forward = partial(share.forward, self)  # type: ignore[method-assign]
        for name, shape in share.shapes().items():
            old = self._parameters.get(name)
            if old is not None:
                empty = torch.empty(shape, dtype=old.dtype, device="meta")
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @property
    def in_features(self) -> int:
        """Inputs of the whole layer."""
        return (self.layout if self.share is None else self.share.whole).in_features

    @property
    def out_features(self) -> int:
        """Outputs of the whole layer."""
        return (self.layout if self.share is None else self.share.whole).out_features

    def packed_tensors(self) -> dict[str, Tensor]:
        """The tensors of the packed matrix by name, as :mod:`hf_spqr.formats` packs them."""
        found = {name: getattr(self, name) for name in (*self.tensor_names, "perm")}
        return {name: tensor.data for name, tensor in found.items() if tensor is not None}

    def nbytes(self) -> int:
        """Bytes of the packed matrix, bias not counted."""
        return nbytes(self.packed_tensors())

    def check(self) -> None:
        """Raise CheckpointError unless the indices and zero points in the tensors are sound; kernels trust them."""
        self.check_tensors(self.layout, self.packed_tensors())

    @classmethod
    def check_tensors(cls, layout: Any, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless the tensors of a matrix of ``layout`` would pass :meth:`check`."""
        try:
            cls._check_trusted(layout, tensors)
        except ValueError as error:
            raise CheckpointError(f"damaged packed layer: {error}") from error

    @staticmethod
    def _check_trusted(layout: Any, tensors: Mapping[str, Tensor]) -> None:
        if "perm" in tensors:
            check_perm(tensors["perm"], layout.in_features)

    @staticmethod
    def layout_numbers(layout: Any) -> tuple[int | bool, ...]:
        """What the ops take after the features: bits, group_size and so on."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]. Raises ValueError if x has another number of columns."""
        if x.size(-1) != self.layout.in_features:
            raise wrong_columns(x, self.layout.in_features)
        held = self._parameters  # the plain dict: reading a parameter as an attribute takes a microsecond each
        bias: Tensor | None = held["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        packed = [held[name] for name in self.tensor_names]
        arguments = (*packed, held["perm"], bias, self.layout.out_features, *self._numbers)
        if self.backend == "reference":
            return type(self).reference_linear(x, *arguments)
        return ops.call_linear(type(self).linear, x, bias, *arguments, self.backend == "int8_activations")

    def dequantize_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [out_features, in_features] in full, of ``dtype`` (the module's float dtype if not given).

        Raises UnsupportedLayerError where this rank holds a part of it only.
        """
        if self.share is not None:
            raise UnsupportedLayerError("this rank holds a part of the layer: load the model without tp_plan")
        dequantize = type(self).reference_dequantize if self.backend == "reference" else type(self).dequantize
        packed = [self._parameters[name] for name in self.tensor_names]
        return dequantize(
            *packed, self.perm, self.out_features, self.in_features, *self._numbers, dtype or self.weight.dtype
        )

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """An ordinary layer of the same function and of the class that the packed one replaced; shares no memory."""
        weight = self.dequantize_weight(dtype)
        bias = None if self.bias is None else self.bias.data.to(weight.dtype, copy=True)
        return make_dense(self.replaces, weight, bias)

    def extra_repr(self) -> str:
        per_weight = 8 * self.nbytes() / (self.layout.in_features * self.layout.out_features)
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.layout.bits}, group_size={self.layout.group_size}, bits_per_weight={per_weight:.3f}"
        )
        return text if self.share is None else f"{text}, share={self.share.rank + 1}/{self.share.size}"
