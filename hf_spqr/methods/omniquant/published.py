"""The published parameters of OmniQuant (arXiv 2308.13137) applied to one block, without training.

The original stores for every block the two clipping factors of each group of each linear layer (LWC) and the scales
and shifts of its equivalent transforms (LET). Only what its code does is done here: the transforms of Llama and OPT
blocks in its order, its clipping, its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_spqr.errors import CheckpointError
from hf_spqr.formats.affine import AffineLayout, AffineWeight

__all__ = ["BlockNames", "clipped_weight", "clipping_of", "fold_transforms"]

MIN_SCALE, MAX_SCALE = 1e-5, 1e4


@dataclass(frozen=True)
class BlockNames:
    """Names inside a block: norms, the layers after them, and the layers of the other transforms."""

    attention_norm: str
    mlp_norm: str
    query: str
    key: str
    value: str
    output: str
    mlp: tuple[str, ...]


FAMILIES = (
    BlockNames(
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"),
    ),
    BlockNames(
        "self_attn_layer_norm", "final_layer_norm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.out_proj", ("fc1",),
    ),
)  # fmt: skip
"""Llama and OPT, the two that the original knows transforms for."""


def fold_transforms(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values (float32) of the parameters of a block that its transforms change, by name inside the block.

    tensors: weights and biases of the block. stored: its entry in the original's file.
    Raises CheckpointError where the file has transforms that the block cannot take.
    """
    if not any("smooth" in name for name in stored):
        return {}
    present = {name.removesuffix(".weight") for name in tensors}
    names = next((f for f in FAMILIES if {f.attention_norm, f.mlp_norm, f.query, f.output, *f.mlp} <= present), None)
    if names is None:
        raise CheckpointError(
            "The file has equivalent transforms, which OmniQuant defines for Llama and OPT blocks only."
        )
    block = _Block(dict(tensors))
    consumers = (names.query, names.key, names.value)
    block.norm(names.attention_norm, consumers, *_pair(stored, "qkv"))
    block.norm(names.mlp_norm, names.mlp, *_pair(stored, "fc1"))
    block.value(names.value, names.output, *_pair(stored, "out"))
    if "qkt_smooth_scale" in stored:
        scale = _used(stored["qkt_smooth_scale"])
        block.rows(names.query, 1 / scale)
        block.rows(names.key, scale)
    return block.changed


class _Block:
    """Parameters of a block by name; what was changed is in ``changed``."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.changed = tensors, dict[str, Tensor]()

    def get(self, name: str) -> Tensor | None:
        tensor = self.changed.get(name, self.tensors.get(name))
        return None if tensor is None else tensor.float()

    def must(self, name: str) -> Tensor:
        tensor = self.get(name)
        if tensor is None:
            raise CheckpointError(f"The block has no {name}, which the transforms of the file change.")
        return tensor

    def set_bias(self, name: str, value: Tensor, shift: Tensor) -> None:
        """Change a bias; one that is not there may only be left at 0."""
        if self.get(name) is not None:
            self.changed[name] = value
        elif bool(shift.any()):
            raise CheckpointError(f"The file shifts activations, but the block has no {name} to take the shift.")

    def bias(self, name: str) -> Tensor:
        found = self.get(name)
        return torch.zeros(()) if found is None else found

    def norm(self, norm: str, layers: tuple[str, ...], scale: Tensor | None, shift: Tensor) -> None:
        """norm / scale, layers * scale (columns); the shift goes from the norm's bias into those of the layers."""
        if scale is None:
            return
        self.set_bias(f"{norm}.bias", (self.bias(f"{norm}.bias") - shift) / scale, shift)
        self.changed[f"{norm}.weight"] = self.must(f"{norm}.weight") / scale
        for layer in layers:
            self.columns(layer, scale, shift)

    def value(self, value: str, output: str, scale: Tensor | None, shift: Tensor) -> None:
        """value / scale (rows), output * scale (columns)."""
        if scale is None:
            return
        if self.must(f"{value}.weight").shape[0] != scale.numel():
            raise CheckpointError(
                "The file scales values of as many channels as the model has; this model shares them."
            )
        self.set_bias(f"{value}.bias", (self.bias(f"{value}.bias") - shift) / scale, shift)
        self.changed[f"{value}.weight"] = self.must(f"{value}.weight") / scale[:, None]
        self.columns(output, scale, shift)

    def columns(self, layer: str, scale: Tensor, shift: Tensor) -> None:
        weight = self.must(f"{layer}.weight")
        if weight.shape[1] != scale.numel():
            raise CheckpointError(f"{layer} has {weight.shape[1]} inputs, the file scales {scale.numel()}.")
        self.set_bias(f"{layer}.bias", self.bias(f"{layer}.bias") + weight @ shift, shift)
        self.changed[f"{layer}.weight"] = weight * scale

    def rows(self, layer: str, scale: Tensor) -> None:
        weight = self.must(f"{layer}.weight")
        if weight.shape[0] != scale.numel():
            raise CheckpointError(f"{layer} has {weight.shape[0]} outputs, the file scales {scale.numel()}.")
        self.changed[f"{layer}.weight"] = weight * scale[:, None]
        bias = self.get(f"{layer}.bias")
        if bias is not None:
            self.changed[f"{layer}.bias"] = bias * scale


def _pair(stored: Mapping[str, Tensor], name: str) -> tuple[Tensor | None, Tensor]:
    """Scale and shift of a transform; no scale where the file has none."""
    scale = stored.get(f"{name}_smooth_scale")
    if scale is None:
        return None, torch.zeros(())
    scale = _used(scale)
    shift = stored.get(f"{name}_smooth_shift")
    return scale, torch.zeros_like(scale) if shift is None else shift.detach().float()


def _used(scale: Tensor) -> Tensor:
    """The original keeps scales away from 0 when it uses them, not when it stores them."""
    scale = scale.detach().float()
    return torch.where(scale.abs() < 1e-2, torch.where(scale < 0, -1e-2, 1e-2), scale)


def clipping_of(stored: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    """The clipping factors (upper, lower) of a layer, each [out_features * groups, 1]; None where it has none."""
    try:
        return tuple(stored[f"{layer}.weight_quantizer.{side}bound_factor"].detach().float() for side in ("up", "low"))  # type: ignore[return-value]
    except KeyError:
        return None


def clipped_weight(
    weight: Tensor, bits: int, group_size: int, clipping: tuple[Tensor, Tensor] | None
) -> tuple[AffineWeight, int]:
    """Quantize weight [N, K] in its clipped min-max grid, as published; also the number of groups without a 0 in it.

    The original lets the zero point of a group that has no 0 in its range lie outside the codes. The packed format
    cannot, so the range of such a group is widened to hold 0.
    Raises CheckpointError where the factors do not fit the shape.
    """
    rows, columns = weight.shape
    width = columns if group_size < 0 else group_size
    if columns % width:
        raise CheckpointError(f"OmniQuant needs whole groups; {columns} inputs are no multiple of {width}.")
    groups = weight.float().reshape(rows, -1, width)
    low, high = groups.amin(-1), groups.amax(-1)
    if clipping is not None:
        up, down = (factor.reshape(-1) for factor in clipping)
        if up.numel() != low.numel() or down.numel() != low.numel():
            raise CheckpointError(
                f"The file has {up.numel()} clipping factors for a layer with {low.numel()} groups: group_size or the"
                " base model is not the one that was trained."
            )
        high, low = high * torch.sigmoid(up.view_as(high)), low * torch.sigmoid(down.view_as(low))
    top = (1 << bits) - 1
    outside = (low > 0) | (high < 0)
    low, high = torch.where(outside, low.clamp_max(0), low), torch.where(outside, high.clamp_min(0), high)
    scale = ((high - low) / top).clamp(MIN_SCALE, MAX_SCALE).half().float()  # what is stored
    zero = (-low / scale).clamp(-1e4, 1e4).round().clamp(0, top)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    layout = AffineLayout(rows, columns, bits, group_size)
    packed = AffineWeight(
        layout=layout,
        codes=codes.reshape(rows, columns).to(torch.uint8),
        scales=scale.to(torch.float16),
        zeros=zero.to(torch.uint8),
    )
    return packed, int(outside.sum())
