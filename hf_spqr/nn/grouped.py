"""The same packed linear layer of many experts, fused in memory and exactly separable into one layer per expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_spqr import ops
from hf_spqr.errors import CheckpointError
from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.columns import check_perm, nbytes
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.nn.affine import AffineLinear, describe_activations
from hf_spqr.nn.packed import Backend, Checked, PackedLinear, Spec
from hf_spqr.nn.spqr import SpQRLinear
from hf_spqr.ops import grouped

__all__ = ["AffineGroupedLinear", "GroupedLinear", "SpQRGroupedLinear"]


class GroupedLinear(Checked):
    """``y = x W_e^T`` for rows x [S, in_features] sorted by expert e, all W_e packed.

    A tensor that has the same shape for every expert is stacked, [E, ...]; one whose length differs (``ragged``) is
    joined end to end. What a file holds are the tensors of each expert by itself: :meth:`split` gives them back.
    """

    linear_class: ClassVar[type[PackedLinear]]
    """The module of one expert."""
    ragged: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[torch._ops.OpOverload]
    reference_linear: ClassVar[Callable[..., Tensor]]
    layout: Any
    packed: Tensor
    perm: Tensor | None

    def __init__(self, layout: Any, tensors: Mapping[str, Tensor], backend: Backend = "auto") -> None:
        super().__init__()
        self.layout = layout
        self.backend: Backend = backend
        self._numbers = self.linear_class.layout_numbers(layout)
        for name in (*self.linear_class.tensor_names, "perm"):
            tensor = tensors[name] if name != "perm" else tensors.get(name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @classmethod
    def join(cls, layout: Any, experts: Sequence[Mapping[str, Tensor]], backend: Backend = "auto") -> GroupedLinear:
        """Fuse the packed tensors of each expert, all of one ``layout``."""
        join = {name: torch.cat if name in cls.ragged else torch.stack for name in experts[0]}
        return cls(layout, {name: join[name]([e[name] for e in experts]) for name in experts[0]}, backend)

    @classmethod
    def empty(cls, layout: Any, experts: Sequence[Mapping[str, Spec]], backend: Backend = "auto") -> GroupedLinear:
        """A module on the meta device for the tensors of experts that a file describes, to be loaded into.

        Raises CheckpointError if a tensor is missing, does not fit the layout, or differs between experts.
        """
        first = experts[0]
        cls.linear_class.empty(layout, first)  # raises where one does not fit
        tensors = {}
        for name, (shape, dtype) in first.items():
            found = [specs.get(name) for specs in experts]
            if name in cls.ragged:
                if any(spec is None or len(spec[0]) != 1 or spec[1] != dtype for spec in found):
                    raise CheckpointError(f"{name!r} is missing or has another dtype for some of the experts")
                shape = (sum(spec[0][0] for spec in found if spec),)
            elif any(spec != (shape, dtype) for spec in found):
                raise CheckpointError(f"{name!r} is missing or has another shape for some of the experts")
            else:
                shape = (len(experts), *shape)
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        return cls(layout, tensors, backend)

    @property
    def experts(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        return self.layout.out_features

    def packed_tensors(self) -> dict[str, Tensor]:
        """The fused tensors by name."""
        found = {name: getattr(self, name) for name in (*self.linear_class.tensor_names, "perm")}
        return {name: tensor.data for name, tensor in found.items() if tensor is not None}

    def split(self) -> list[dict[str, Tensor]]:
        """The packed tensors of each expert, as views: what :func:`formats.*.pack` gave for it."""
        parts = {
            name: self._split_ragged(tensor) if name in self.ragged else tensor.unbind()
            for name, tensor in self.packed_tensors().items()
        }
        return [{name: part[expert] for name, part in parts.items()} for expert in range(self.experts)]

    def _split_ragged(self, tensor: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of the packed matrices of all experts."""
        return nbytes(self.packed_tensors())

    def outliers(self) -> int:
        """Weights kept in 16 bit in all experts."""
        return 0

    def check(self) -> None:
        """Raise CheckpointError unless the indices and zero points in the tensors are sound; kernels trust them."""
        try:
            self._check_trusted()
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"damaged packed experts: {error}") from error

    def _check_trusted(self) -> None:
        if self.perm is not None:
            for perm in self.perm:
                check_perm(perm, self.in_features)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [S, in_features] -> [S, out_features]; rows of expert e are ``ends[e - 1]`` to ``ends[e]`` (int64 [E]).

        Rows from ``ends[-1]`` on give zeros.
        """
        held = self._parameters
        packed = [held[name] for name in self.linear_class.tensor_names]
        linear = type(self).reference_linear if self.backend == "reference" else type(self).linear
        flags = self.backend == "int8_activations", False
        return linear(x, ends, *packed, held["perm"], self.out_features, self.in_features, *self._numbers, *flags)

    def dequantize_weight(self, dtype: torch.dtype) -> Tensor:
        """The matrices of all experts in full, [E, out_features, in_features] of ``dtype``."""
        weight = torch.empty(self.experts, self.out_features, self.in_features, dtype=dtype, device=self.packed.device)
        for expert, tensors in enumerate(self.split()):
            weight[expert] = self.linear_class(self.layout, tensors, None, dtype, self.backend).dequantize_weight()
        return weight

    def extra_repr(self) -> str:
        per_weight = 8 * self.nbytes() / (self.experts * self.in_features * self.out_features)
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.layout.bits}, group_size={self.layout.group_size}, bits_per_weight={per_weight:.3f}"
        )


class SpQRGroupedLinear(GroupedLinear):
    """Experts in the format of :mod:`hf_spqr.formats.spqr`."""

    linear_class = SpQRLinear
    ragged = ("outlier",)
    linear, reference_linear = ops.spqr_grouped_linear, grouped.reference_spqr_grouped_linear
    layout: SpQRLayout
    outlier_row: Tensor
    outlier: Tensor

    def outliers(self) -> int:
        return self.outlier.numel()

    def _split_ragged(self, tensor: Tensor) -> Sequence[Tensor]:
        return grouped.split_outliers(self.outlier_row, tensor)

    def _check_trusted(self) -> None:
        super()._check_trusted()
        spqr.check_statistics(self.layout, self.packed)
        for row, outlier in zip(self.outlier_row, self._split_ragged(self.outlier), strict=True):
            spqr.check_outliers(self.layout, row, outlier)


class AffineGroupedLinear(GroupedLinear):
    """Experts in the format of :mod:`hf_spqr.formats.affine`.

    ``act_bits``, ``act_sym``: the input is quantized first, as in :class:`~hf_spqr.nn.affine.AffineLinear`.
    """

    act_bits: int | None = None
    act_sym: bool = False
    linear_class = AffineLinear
    linear, reference_linear = ops.affine_grouped_linear, grouped.reference_affine_grouped_linear
    layout: AffineLayout

    def _check_trusted(self) -> None:
        super()._check_trusted()
        affine.check_statistics(self.layout, self.packed)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        if self.act_bits is None:
            return super().forward(x, ends)
        integers = (
            grouped.reference_integer_grouped_linear if self.backend == "reference" else ops.integer_grouped_linear
        )
        shape = (self.out_features, self.in_features)
        held = self._parameters
        return integers(x, ends, held["packed"], held["perm"], *shape, *self._numbers, self.act_bits, self.act_sym)

    def extra_repr(self) -> str:
        return super().extra_repr() + describe_activations(self.act_bits, self.act_sym)
