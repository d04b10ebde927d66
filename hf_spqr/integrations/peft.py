"""LoRA on packed layers: `peft.get_peft_model(model, LoraConfig(...))` works as on any model.

Imported when PEFT is, see :mod:`hf_spqr`. The packed weights stay as they are; gradients pass through them to the
adapters. Merging turns the adapted layers into ordinary ones, because a sum of packed and low-rank weights is not
packed.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
from packaging.version import Version
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraConfig
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_spqr.errors import UnsupportedLayerError
from hf_spqr.nn import PackedExperts, PackedLinear

__all__ = ["LoraPackedLinear", "install"]

OLDEST = "0.20"
"""The first version of PEFT whose layers are made as here."""

INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weights as they are and do not read them."""


class LoraPackedLinear(Linear):
    """A packed layer with adapters beside it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        packed: Any = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        if packed.packed.is_meta:  # PEFT would leave the adapters without data too
            raise UnsupportedLayerError("Adapters cannot stand beside offloaded layers: load without offload.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = packed.replaces is Conv1D  # what merge puts in its place is transposed
        self.packed_layers: list[PackedLinear] = []  # what merge put an ordinary layer in the place of; no submodule

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Put an adapter, the first or one more, beside the layer.

        Raises UnsupportedLayerError for a kind of adapter that needs the base weights.
        """
        if config.init_lora_weights not in INITIALIZATIONS:
            raise UnsupportedLayerError(
                f"init_lora_weights={config.init_lora_weights!r} reads or changes the base weights, which are packed;"
                " use True."
            )
        if config.use_dora:
            raise UnsupportedLayerError("use_dora=True needs the base weights in full; packed layers take plain LoRA.")
        if getattr(config, "kasa_config", None) is not None:
            raise UnsupportedLayerError("KaSA changes the base weights, which are packed; they take plain LoRA.")
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weights of an ordinary layer, which takes the place of the packed one."""
        if isinstance(self.base_layer, PackedLinear):
            self.packed_layers = [self.base_layer]
            self.base_layer = self.base_layer.to_linear()
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put the packed layer back, exactly as it was."""
        if self.merged:
            self.merged_adapters.clear()
        if self.packed_layers:
            self.base_layer = self.packed_layers.pop()


def install() -> None:
    """Let PEFT find :class:`LoraPackedLinear` for packed layers, also for ``target_modules="all-linear"``."""
    default, expand = lora_model.dispatch_default, tuners_utils._maybe_include_all_linear_layers
    if getattr(default, "knows_packed_layers", False):
        return

    too_old = Version(peft.__version__) < Version(OLDEST)

    def dispatch(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> nn.Module | None:
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if too_old and isinstance(layer, PackedExperts | PackedLinear):
            raise UnsupportedLayerError(
                f"Adapters beside packed layers need PEFT {OLDEST} or newer, this is {peft.__version__}."
            )
        if isinstance(layer, PackedExperts):
            raise UnsupportedLayerError(
                f"{kwargs.get('target_name', 'experts')}: packed experts take no adapters. Name layers outside of"
                " them, for example target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']."
            )
        if isinstance(layer, PackedLinear):
            return LoraPackedLinear(target, adapter_name, *args, **kwargs)
        return default(target, adapter_name, *args, **kwargs)

    def expand_all_linear(config: Any, model: nn.Module) -> Any:
        asked = getattr(config, "target_modules", None)
        config = expand(config, model)
        if isinstance(asked, str) and asked.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            adapted = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
            inside = {child for layer in adapted for child in layer.modules()}
            packed = {n for n, m in model.named_modules() if isinstance(m, PackedLinear) and m not in inside}
            config.target_modules = {*config.target_modules, *packed}
        return config

    dispatch.knows_packed_layers = True  # type: ignore[attr-defined]
    lora_model.dispatch_default = dispatch
    tuners_utils._maybe_include_all_linear_layers = expand_all_linear  # type: ignore[assignment]
