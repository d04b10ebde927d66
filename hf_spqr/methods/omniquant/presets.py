"""Presets by name: ``"W3A16g128"`` and the like, and the published settings behind ``reference=True``."""

from __future__ import annotations

import re
from dataclasses import replace

from hf_spqr.errors import ConfigError

from .params import OmniQuantParams

PRESETS = (
    "W2A16", "W2A16g128", "W2A16g64", "W2A16g32", "W3A16", "W3A16g128", "W3A16g64", "W3A16g32",
    "W4A16", "W4A16g128", "W4A16g64", "W4A16g32", "W8A16", "W4A4", "W4A8", "W6A6", "W8A8",
)  # fmt: skip
"""The documented names. Any ``W{2..8}A{2..8,16}[g{n}]`` is understood."""


def preset(name: str, *, reference: bool = False) -> OmniQuantParams:
    """Parameters of a preset such as ``"W2A16g64"`` or ``"W4A4"``.

    reference: train as published (section 4.1 and the released scripts): clipping only, fixed order, batch size 1, no
    schedule, 20 epochs (40 at 2 bits), equivalent transforms where activations are quantized, ``aug_loss`` at 2 bits
    and for W4A4.

    Raises:
        ConfigError: the name is not of that form.
    """
    match = re.fullmatch(r"W([2-8])A([2-8]|16)(?:g(\d+))?", name)
    if match is None:
        raise ConfigError(
            f"unknown preset {name!r}; use W<bits>A<bits>[g<group size>], for example W3A16g128, W4A16 or W4A4:"
            " weights of 2 to 8 bits, activations of 2 to 8 or 16"
        )
    bits, act = int(match[1]), int(match[2])
    params = OmniQuantParams(
        bits=bits, act_bits=None if act == 16 else act, group_size=int(match[3]) if match[3] else -1
    )
    if not reference:
        return params
    return replace(
        params,
        rounding=False,
        let_pairs=("norm", "value", "qk"),
        let_alpha=(0.5,),
        let_log=False,
        epochs=40 if bits == 2 else 20,
        batch_size=1,
        lwc_lr=1e-2,
        let_lr=5e-3,
        cosine=False,
        shuffle=False,
        aug_loss=bits == 2 or (bits == 4 and act == 4),
        fisher=False,
        holdout=0.0,
        zero_grad=False,
    )
