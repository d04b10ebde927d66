"""GPTQ version 2 folders (zero points stored as they are), read into our affine format.

That is what OmniQuant's own ``--real_quant`` writes and what GPTQModel calls ``checkpoint_format: "gptq_v2"``.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto

from hf_spqr.config import OmniQuantConfig
from hf_spqr.errors import CheckpointError
from hf_spqr.formats import gptq_v2
from hf_spqr.formats.affine import AffineWeight
from hf_spqr.integrations.stored import ImportingQuantizer, StoredLinear
from hf_spqr.integrations.transformers import OmniQuantQuantizer

__all__ = ["GptqV2Config", "GptqV2Quantizer", "load_gptq_v2"]

METHOD = "gptq_v2"


class GptqV2Config(OmniQuantConfig):
    """What must be known to read such a folder: ``bits`` and ``group_size`` (-1: one group per output channel)."""

    quant_method = METHOD

    def __init__(self, bits: int, group_size: int = -1, backend: str = "auto", **ignored: Any) -> None:
        largest = gptq_v2.LARGEST_GROUP
        size = largest if group_size > largest and group_size % largest == 0 else group_size
        super().__init__(bits=bits, group_size=size, lwc=False, rounding=False, epochs=0, backend=backend)


class GptqV2Quantizer(ImportingQuantizer, OmniQuantQuantizer):
    """Loads only, and leaves a model of ``quant_method: "omniquant"``."""

    needed = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)
    title = "the GPTQ v2 checkpoints"

    def read(self, linear: StoredLinear, tensors: dict[str, Tensor]) -> AffineWeight:
        config: GptqV2Config = self.quantization_config
        weight = gptq_v2.decode(config.bits, tensors)
        layout = weight.layout
        if (layout.out_features, layout.in_features) != (linear.out_features, linear.in_features):
            raise ValueError(
                f"at {config.bits} bits its tensors hold {layout.out_features} x {layout.in_features}, the layer is"
                f" {linear.out_features} x {linear.in_features}: bits is not what the checkpoint has"
            )
        return with_group_size(weight, config.group_size)

    def our_config(self) -> OmniQuantConfig:
        config: GptqV2Config = self.quantization_config
        return OmniQuantConfig(
            bits=config.bits, group_size=config.group_size, lwc=False, rounding=False, epochs=0, backend=config.backend
        )


def with_group_size(weight: AffineWeight, group_size: int) -> AffineWeight:
    """The same matrix in smaller groups: statistics are repeated. Raises ValueError where that is not possible."""
    lay = weight.layout
    now = lay.in_features if lay.per_channel else lay.group_size
    wanted = lay.in_features if group_size < 0 else group_size
    if now == wanted or (lay.per_channel and wanted >= lay.in_features):
        repeats = 1
    elif now % wanted == 0 or lay.groups == 1:
        repeats = -(-now // wanted)
    else:
        raise ValueError(f"its groups have {now} columns, not {wanted}: group_size is not what the checkpoint has")
    layout = dataclasses.replace(lay, group_size=group_size)
    zeros = None if weight.zeros is None else weight.zeros.repeat_interleave(repeats, 1)[:, : layout.groups]
    return dataclasses.replace(
        weight, layout=layout, scales=weight.scales.repeat_interleave(repeats, 1)[:, : layout.groups], zeros=zeros
    )


def load_gptq_v2(
    folder: str | os.PathLike[str], bits: int | None = None, group_size: int | None = None, **kwargs: Any
) -> Any:
    """Load a GPTQ v2 checkpoint as a model in our format; ``kwargs`` are those of ``from_pretrained``.

    bits, group_size: taken from the config where it has them; OmniQuant's folders have none and need them here.

    Raises:
        CheckpointError: the folder is in another format, or bits or group_size are missing or wrong.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=kwargs.get("trust_remote_code", False))
    stored = dict(getattr(config, "quantization_config", None) or {})
    if stored:
        form = stored.get("checkpoint_format", "gptq")
        if stored.get("quant_method") != "gptq" or form != METHOD:
            raise CheckpointError(
                f'{folder} has quant_method "{stored.get("quant_method")}" and checkpoint_format "{form}"; only GPTQ'
                ' folders of checkpoint_format "gptq_v2" are read (version 1 stores zero points less one).'
            )
    bits = stored.get("bits") if bits is None else bits
    group_size = stored.get("group_size") if group_size is None else group_size
    if bits is None or group_size is None:
        raise CheckpointError(f"The config of {folder} does not say how it was quantized: give bits and group_size.")
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = GptqV2Quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = GptqV2Config
    config.quantization_config = {"quant_method": METHOD, "bits": bits, "group_size": group_size}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **kwargs)
