"""``quant_method: "hf_spqr"``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_spqr.config.base import (
    FORMAT_VERSION,
    GROUP_SIZES,
    PackedConfig,
    check_choice,
    check_flag,
    check_int,
    check_number,
    name_matches,
)

if TYPE_CHECKING:
    from hf_spqr.formats.spqr import SpQRLayout
    from hf_spqr.methods.base import SpQRParams

__all__ = ["SpQRConfig"]

BITS, GROUP_SIZE = 3, 16
"""What None means where no size is asked for."""


class SpQRConfig(PackedConfig):
    """SpQR (arXiv 2306.03078): small groups with two-level statistics, and sensitive weights kept in 16 bit.

    Args:
        bits: bits of a code, 2 to 8. ``None``: 3, or chosen for ``target_bits``.
        group_size: weights along the input that share a scale and a zero point: 8, 16, 32, 64, 128, or -1 for one
            group per output channel. ``None``: 16, or chosen for ``target_bits``.
        scale_bits, zero_bits: bits of the first-level statistics, 2 to 8 (the paper's b_s, b_z). The format stores
            both with the larger of the two.
        second_group: 16 or 32, how many first-level statistics (16 rows times 1 or 2 groups) share the second level.
        outlier_threshold: the paper's tau; smaller means more outliers. ``math.inf`` (or ``"inf"``) keeps none.
        target_bits: bits per weight that the packed layers shall take (within 1 %). Of ``bits`` and ``group_size``,
            what is None becomes the most bits that fit, then the smallest groups that fit; the threshold
            is such that outliers take what is left.
        act_order: quantize columns in order of activation energy. ``None`` takes the default of the mode.
        percdamp: damping of the Hessian relative to its mean diagonal. ``None`` takes the default of the mode.
        mode: ``"default"``, or ``"reference"`` for the published algorithm in every choice.
        true_sequential: calibrate the layers of a block one after another instead of together.
        dataset: calibration data: strings, token ids, a `datasets` object, a json/jsonl/txt path, or a Hub name.
        tokenizer: tokenizer or its name; by default the one beside the model.
        nsamples, seqlen: number of calibration sequences and their length in tokens.
        seed: order in which calibration documents are drawn.
        modules_to_not_convert: names, suffixes or regular expressions of layers to leave alone (see
            :func:`name_matches`). Embeddings and the output head are always left alone.
        overrides: ``{pattern: {field: value}}`` changes of the fields above ``mode`` for some layers, later ones win.
        backend: ``"auto"``, ``"reference"`` (plain PyTorch), or ``"int8_activations"``: kernels may round activations
            to int8 per block of 128 columns where that is faster, others stay exact (docs/cpu.md). Not stored, may be
            given again at load.
        format_version: version of the packed format.

    Raises:
        ConfigError: a field is outside its range.
        CheckpointError: ``format_version`` is unknown.
    """

    quant_method = "hf_spqr"
    LAYER_FIELDS = (
        "bits",
        "group_size",
        "scale_bits",
        "zero_bits",
        "second_group",
        "outlier_threshold",
        "act_order",
        "percdamp",
    )

    def __init__(
        self,
        bits: int | None = None,
        group_size: int | None = None,
        scale_bits: int = 3,
        zero_bits: int = 3,
        second_group: int = 16,
        outlier_threshold: float | str = 0.2,
        target_bits: float | None = None,
        act_order: bool | None = None,
        percdamp: float | None = None,
        mode: str = "default",
        true_sequential: bool = False,
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
        chosen_later = target_bits is not None
        self.bits = BITS if bits is None and not chosen_later else bits
        self.group_size = GROUP_SIZE if group_size is None and not chosen_later else group_size
        self.scale_bits, self.zero_bits, self.second_group = scale_bits, zero_bits, second_group
        self.outlier_threshold = math.inf if outlier_threshold == "inf" else outlier_threshold
        self.target_bits = target_bits
        self.act_order, self.percdamp = act_order, percdamp
        self.mode, self.true_sequential = mode, true_sequential
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

    def validate(self) -> None:
        super().validate()
        check_choice("mode", self.mode, ("default", "reference"))
        check_flag("true_sequential", self.true_sequential)
        if self.target_bits is not None:
            check_number("target_bits", self.target_bits, 2 if self.bits is None else self.bits, exclusive=True)

    def validate_layer_fields(self, fields: Mapping[str, Any]) -> None:
        if fields["bits"] is not None or self.bits is not None:
            check_int("bits", fields["bits"], 2, 8)
        if fields["group_size"] is not None or self.group_size is not None:
            check_choice("group_size", fields["group_size"], GROUP_SIZES)
        check_int("scale_bits", fields["scale_bits"], 2, 8)
        check_int("zero_bits", fields["zero_bits"], 2, 8)
        check_choice("second_group", fields["second_group"], (16, 32))
        check_number("outlier_threshold", fields["outlier_threshold"], 0, exclusive=True)
        if fields["act_order"] is not None:
            check_flag("act_order", fields["act_order"])
        if fields["percdamp"] is not None:
            check_number("percdamp", fields["percdamp"], 0)

    def settle(self) -> None:
        params = self.params()
        self.act_order, self.percdamp = params.permutes, params.damping

    def stores_order(self, *names: str) -> bool | None:
        order: bool | None = self.layer_fields(*names)["act_order"]
        return order

    def has_own_threshold(self, *names: str) -> bool:
        """Whether ``overrides`` give the layer that goes by ``names`` an ``outlier_threshold``."""
        found = (pattern for pattern, changes in self.overrides.items() if "outlier_threshold" in changes)
        return any(name_matches(pattern, name) for pattern in found for name in names)

    def layout(self, out_features: int, in_features: int, *names: str) -> SpQRLayout:
        from hf_spqr.formats.spqr import SpQRLayout

        fields = self.layer_fields(*names)
        return SpQRLayout(
            out_features=out_features,
            in_features=in_features,
            bits=fields["bits"],
            group_size=fields["group_size"],
            stat_bits=max(fields["scale_bits"], fields["zero_bits"]),
            second_group=fields["second_group"],
        )

    def params(self, *names: str) -> SpQRParams:
        """The arguments of :func:`hf_spqr.methods.spqr.quantize` for the layer that goes by ``names``."""
        from hf_spqr.methods.base import SpQRParams

        fields = {key: value for key, value in self.layer_fields(*names).items() if value is not None}
        return SpQRParams(**fields, mode=self.mode)
