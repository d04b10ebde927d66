"""``quant_method: "omniquant"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch

from hf_spqr.config.base import (
    FORMAT_VERSION,
    GROUP_SIZES,
    PackedConfig,
    check_choice,
    check_flag,
    check_int,
    check_number,
)
from hf_spqr.errors import ConfigError

if TYPE_CHECKING:
    from hf_spqr.formats.affine import AffineLayout
    from hf_spqr.methods.omniquant import OmniQuantParams

__all__ = ["OmniQuantConfig"]

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class OmniQuantConfig(PackedConfig):
    """OmniQuant (arXiv 2308.13137): affine codes whose grids, rounding and transforms are learned block by block.

    Args:
        bits: bits of a weight, 2 to 8.
        group_size: weights along the input that share a scale: 8, 16, 32, 64, 128, or -1 for one per output channel.
        act_bits: bits of the activations (per token, dynamic), 2 to 8; ``None`` leaves them alone.
        sym: symmetric weights.
        lwc: learn the grid of the weights. let: learn equivalent transforms; ``None`` means where activations are
            quantized. rounding: learn the rounding of every weight.
        epochs, batch_size, lwc_lr, let_lr, rounding_lr: the training of a block; ``None`` takes the method's default.
        learning: further fields of :class:`hf_spqr.methods.omniquant.OmniQuantParams`, by name.
        scale_dtype: ``"float16"`` or ``"bfloat16"``, in which scales are stored.
        act_sym: symmetric activations (zero point 0); else the grid of a token spans its minimum and maximum.
        overrides: ``{pattern: {field: value}}`` changes of ``bits``, ``group_size`` and ``sym`` for some layers, later
            ones win. With ``act_bits``, ``group_size`` is -1 for all of them.
        dataset, tokenizer, nsamples, seqlen, seed, modules_to_not_convert, backend, format_version: as in
            :class:`~hf_spqr.config.SpQRConfig`.

    Raises:
        ConfigError: a field is outside its range.
        CheckpointError: ``format_version`` is unknown.
    """

    quant_method = "omniquant"
    LAYER_FIELDS = ("bits", "group_size", "sym")

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        act_bits: int | None = None,
        sym: bool = False,
        lwc: bool = True,
        let: bool | None = None,
        rounding: bool = True,
        epochs: int | None = None,
        batch_size: int | None = None,
        lwc_lr: float | None = None,
        let_lr: float | None = None,
        rounding_lr: float | None = None,
        learning: Mapping[str, Any] | None = None,
        scale_dtype: str = "float16",
        act_sym: bool = False,
        dataset: Any = None,
        tokenizer: Any = None,
        nsamples: int = 128,
        seqlen: int = 2048,
        seed: int = 0,
        modules_to_not_convert: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        backend: str = "auto",
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        self.bits, self.group_size, self.act_bits, self.sym = bits, group_size, act_bits, sym
        self.act_sym = act_sym
        self.lwc, self.let, self.rounding = lwc, let, rounding
        self.epochs, self.batch_size = epochs, batch_size
        self.lwc_lr, self.let_lr, self.rounding_lr = lwc_lr, let_lr, rounding_lr
        self.learning = dict(learning or {})
        self.scale_dtype = scale_dtype
        self._init_common(
            dataset=dataset,
            tokenizer=tokenizer,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            modules_to_not_convert=modules_to_not_convert,
            overrides=overrides,
            backend=backend,
            format_version=format_version,
            unknown=unknown,
        )

    @classmethod
    def from_preset(cls, name: str, *, reference: bool = False, **fields: Any) -> OmniQuantConfig:
        """The config of a preset such as ``"W3A16g128"`` or ``"W4A4"``; ``fields`` change or add to it.

        ``reference``: train as published. Raises ConfigError for an unknown name or a field out of range.
        """
        from hf_spqr.methods.omniquant import preset

        params = asdict(preset(name, reference=reference))
        params["scale_dtype"] = next(key for key, value in SCALE_DTYPES.items() if value == params["scale_dtype"])
        del params["seed"]
        own = {key: params.pop(key) for key in list(params) if key in cls._own_fields()}
        learning = {**params, **(fields.pop("learning", None) or {})}
        return cls(**{**own, "learning": learning, **fields})

    @staticmethod
    def _own_fields() -> set[str]:
        return {
            "bits", "group_size", "act_bits", "act_sym", "sym", "lwc", "let", "rounding", "epochs", "batch_size",
            "lwc_lr", "let_lr", "rounding_lr", "scale_dtype",
        }  # fmt: skip

    def validate(self) -> None:
        super().validate()
        for name in ("act_sym", "lwc", "rounding"):
            check_flag(name, getattr(self, name))
        if self.let is not None:
            check_flag("let", self.let)
        for name, low in (("epochs", 0), ("batch_size", 1)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low)
        for name in ("lwc_lr", "let_lr", "rounding_lr"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        check_choice("scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES))
        self.params()

    def validate_layer_fields(self, fields: Mapping[str, Any]) -> None:
        check_int("bits", fields["bits"], 2, 8)
        check_choice("group_size", fields["group_size"], GROUP_SIZES)
        check_flag("sym", fields["sym"])
        if self.act_bits is None:
            return
        check_int("act_bits", self.act_bits, 2, 8)
        if fields["group_size"] != -1:
            raise ConfigError(
                f"group_size={fields['group_size']}: quantized activations (act_bits) need weights with one scale per"
                " channel, group_size=-1."
            )

    def layout(self, out_features: int, in_features: int, *names: str) -> AffineLayout:
        from hf_spqr.formats.affine import AffineLayout

        fields = self.layer_fields(*names)
        return AffineLayout(
            out_features=out_features,
            in_features=in_features,
            bits=fields["bits"],
            group_size=fields["group_size"],
            symmetric=fields["sym"],
            scale_dtype=SCALE_DTYPES[self.scale_dtype],
        )

    def params(self) -> OmniQuantParams:
        """The parameters of :func:`hf_spqr.methods.omniquant.quantize_block`; overrides are in :meth:`layout`."""
        from hf_spqr.methods.omniquant import OmniQuantParams

        known = {field.name for field in fields(OmniQuantParams)} - self._own_fields() - {"seed"}
        for name in self.learning:
            if name not in known:
                raise ConfigError(f"learning: {name!r} is not one of {', '.join(sorted(known))}.")
        own = {name: getattr(self, name) for name in self._own_fields()}
        own = {name: value for name, value in own.items() if value is not None}
        own["scale_dtype"] = SCALE_DTYPES[self.scale_dtype]
        more = {name: tuple(value) if isinstance(value, list) else value for name, value in self.learning.items()}
        return OmniQuantParams(**{**own, **more, "seed": self.seed})
