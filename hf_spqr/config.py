"""The quantization configs that Transformers stores in ``config.json``: :class:`SpQRConfig`.

A config has three kinds of fields:

* what the file needs to be read (``bits``, ``group_size``, ...), always serialized;
* how the weights were found (``outlier_threshold``, ``nsamples``, ...), serialized as a record;
* what only this process knows (``dataset``, ``tokenizer``, ``backend``), never serialized.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from .formats.affine import AffineLayout
    from .formats.spqr import SpQRLayout
    from .methods.base import SpQRParams

__all__ = ["FORMAT_VERSION", "PackedConfig", "SpQRConfig", "name_matches"]

FORMAT_VERSION = 1
"""Version of the packed format (docs/format.md) that this code reads and writes."""

BACKENDS = ("auto", "reference")
GROUP_SIZES = (-1, 8, 16, 32, 64, 128)


def name_matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` selects the module called ``name``.

    A pattern made of plain names and dots matches whole components of the name: ``"q_proj"``, ``"mlp"``,
    ``"layers.1"`` (which is not ``layers.11``) or a full name. Anything else is a regular expression that is searched
    for in the name.
    """
    if re.fullmatch(r"[\w.]+", pattern):
        return f".{pattern}." in f".{name}."
    return re.search(pattern, name) is not None


def check_int(field: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise :class:`ConfigError` unless ``value`` is an integer in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{field}={value!r}: use a whole number {limits}.")


def check_number(field: str, value: Any, low: float, *, exclusive: bool = False) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a number of at least (or, ``exclusive``, above) ``low``."""
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not (value > low if exclusive else value >= low):
        raise ConfigError(f"{field}={value!r}: use a number {'above' if exclusive else 'of at least'} {low:g}.")


def check_flag(field: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field}={value!r}: use True or False.")


def check_choice(field: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if isinstance(value, bool) or value not in choices:
        raise ConfigError(f"{field}={value!r}: use one of {', '.join(map(repr, choices))}.")


def check_pattern(field: str, pattern: Any) -> None:
    """Raise :class:`ConfigError` unless ``pattern`` is a string that compiles as a regular expression."""
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{field}: {pattern!r} is not a module name, suffix or regular expression.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}: {pattern!r} is not a valid regular expression ({error}).") from error


def _to_json(value: Any) -> Any:
    """A copy of ``value`` that any JSON reader takes: infinity, which JSON lacks, becomes ``"inf"``."""
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return "inf" if value == math.inf else value


class PackedConfig(QuantizationConfigMixin):
    """What every method of hf_spqr shares: calibration data, selection of layers, versions, serialization.

    A subclass sets ``quant_method`` and ``LAYER_FIELDS`` (the fields that :attr:`overrides` may change), passes what
    is common to :meth:`_init_common`, checks its own fields in :meth:`validate_layer_fields` and says in
    :meth:`layout` how a layer is stored.
    """

    quant_method: Any = ""
    LAYER_FIELDS: ClassVar[tuple[str, ...]] = ()
    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ("dataset", "tokenizer", "backend")
    backend: Literal["auto", "reference"]
    LOADING_ATTRIBUTES: ClassVar[tuple[str, ...]] = ("backend",)

    def _init_common(
        self,
        *,
        dataset: Any,
        tokenizer: Any,
        nsamples: int,
        seqlen: int,
        seed: int,
        modules_to_not_convert: Sequence[str] | None,
        overrides: Mapping[str, Mapping[str, Any]] | None,
        backend: str,
        format_version: int,
        unknown: Mapping[str, Any],
    ) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer
        self.nsamples, self.seqlen, self.seed = nsamples, seqlen, seed
        if isinstance(modules_to_not_convert, str):
            raise ConfigError("modules_to_not_convert: use a list of module names, suffixes or regular expressions.")
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.overrides = copy.deepcopy(dict(overrides)) if overrides else {}
        for changes in self.overrides.values():
            if isinstance(changes, dict) and changes.get("outlier_threshold") == "inf":
                changes["outlier_threshold"] = math.inf
        self.backend = backend  # type: ignore[assignment]  # checked in validate
        self.format_version = format_version
        self._accept_unknown(unknown)
        self.validate()

    def _accept_unknown(self, unknown: Mapping[str, Any]) -> None:
        method = unknown.get("quant_method", self.quant_method)
        method = getattr(method, "value", method)
        if method != self.quant_method:
            raise ConfigError(f"quant_method={method!r} does not belong to {type(self).__name__}.")
        names = [key for key in unknown if key != "quant_method"]
        known = [key for key in self.__dict__ if not key.startswith("_")]
        for name in names:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            warnings.warn(f"{type(self).__name__}: unknown field {name!r} is ignored.{hint}", stacklevel=4)

    # -- validation ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every field.

        Raises:
            CheckpointError: ``format_version`` is not one that this version of hf_spqr can read.
            ConfigError: any other field is outside its range.
        """
        if self.format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"format_version={self.format_version!r}: this hf_spqr reads version {FORMAT_VERSION} of the packed "
                "format. Install the version of hf-spqr that wrote the checkpoint, or a newer one."
            )
        check_int("nsamples", self.nsamples, 1)
        check_int("seqlen", self.seqlen, 1)
        check_int("seed", self.seed, 0)
        check_choice("backend", self.backend, BACKENDS)
        for pattern in self.modules_to_not_convert or ():
            check_pattern("modules_to_not_convert", pattern)
        self.validate_layer_fields(self.layer_fields())
        for pattern, changes in self.overrides.items():
            check_pattern("overrides", pattern)
            if not isinstance(changes, Mapping):
                raise ConfigError(f"overrides[{pattern!r}]={changes!r}: use a dict of fields, e.g. {{'bits': 4}}.")
            for key in changes:
                if key not in self.LAYER_FIELDS:
                    allowed = ", ".join(self.LAYER_FIELDS)
                    raise ConfigError(f"overrides[{pattern!r}]: {key!r} cannot differ per layer; use {allowed}.")
            try:
                self.validate_layer_fields({**self.layer_fields(), **changes})
            except ConfigError as error:
                raise ConfigError(f"overrides[{pattern!r}]: {error}") from None

    def validate_layer_fields(self, fields: Mapping[str, Any]) -> None:
        """Check ``fields``, a full set of :attr:`LAYER_FIELDS`; raise :class:`ConfigError`."""
        raise NotImplementedError

    # -- what a layer gets -----------------------------------------------------------------------------------------

    def layer_fields(self, *names: str) -> dict[str, Any]:
        """The per-layer fields, for the layer that goes by ``names`` (overrides that match any, applied in order)."""
        fields = {key: getattr(self, key) for key in self.LAYER_FIELDS}
        for pattern, changes in self.overrides.items():
            if any(name_matches(pattern, name) for name in names):
                fields.update(changes)
        return fields

    def excludes(self, name: str) -> bool:
        """Whether ``modules_to_not_convert`` selects the module called ``name``."""
        return any(name_matches(pattern, name) for pattern in self.modules_to_not_convert or ())

    def layout(self, out_features: int, in_features: int, *names: str) -> SpQRLayout | AffineLayout:
        """How the weight ``[out_features, in_features]`` of the layer that goes by ``names`` is stored."""
        raise NotImplementedError

    # -- what Transformers needs -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All serialized fields; ``dataset``, ``tokenizer`` and ``backend`` are not among them."""
        fields = {k: _to_json(v) for k, v in self.__dict__.items() if k not in self.RUNTIME_FIELDS}
        return {"quant_method": self.quant_method, **fields}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedConfig:
        # from_pretrained deep-copies its arguments: data sets and tokenizers are shared, they may not be copyable
        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = value if key in self.RUNTIME_FIELDS else copy.deepcopy(value, memo)
        return new

    def get(self, key: str, default: Any = None) -> Any:
        """Dict-like access, which Transformers uses on the config of an already quantized model."""
        return getattr(self, key, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """The fields that a config passed to ``from_pretrained`` changes on an already quantized model."""
        return {key: getattr(self, key) for key in self.LOADING_ATTRIBUTES}

    def forget_data(self) -> None:
        """Drop the calibration data and the tokenizer, which a quantized model no longer needs."""
        self.dataset = self.tokenizer = None


class SpQRConfig(PackedConfig):
    """SpQR (arXiv 2306.03078): small groups with two-level statistics, and sensitive weights kept in 16 bit.

    Args:
        bits: bits of a code, 2 to 8.
        group_size: weights along the input that share a scale and a zero point: 8, 16, 32, 64, 128, or -1 for one
            group per output channel.
        scale_bits, zero_bits: bits of the first-level statistics, 2 to 8 (the paper's b_s, b_z). The format stores
            both with the larger of the two.
        second_group: 16 or 32, how many first-level statistics (16 rows times 1 or 2 groups) share the second level.
        outlier_threshold: the paper's tau; smaller means more outliers. ``math.inf`` (or ``"inf"``) keeps none.
        target_bits: choose the threshold so that the packed layers take this many bits per weight (within 1 %).
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
        backend: ``"auto"`` or ``"reference"`` (plain PyTorch); not stored, may be given again at load.
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
        bits: int = 3,
        group_size: int = 16,
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
        self.bits, self.group_size = bits, group_size
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
            check_number("target_bits", self.target_bits, self.bits, exclusive=True)

    def validate_layer_fields(self, fields: Mapping[str, Any]) -> None:
        check_int("bits", fields["bits"], 2, 8)
        check_choice("group_size", fields["group_size"], GROUP_SIZES)
        check_int("scale_bits", fields["scale_bits"], 2, 8)
        check_int("zero_bits", fields["zero_bits"], 2, 8)
        check_choice("second_group", fields["second_group"], (16, 32))
        check_number("outlier_threshold", fields["outlier_threshold"], 0, exclusive=True)
        if fields["act_order"] is not None:
            check_flag("act_order", fields["act_order"])
        if fields["percdamp"] is not None:
            check_number("percdamp", fields["percdamp"], 0)

    def layout(self, out_features: int, in_features: int, *names: str) -> SpQRLayout:
        from .formats.spqr import SpQRLayout

        fields = self.layer_fields(*names)
        return SpQRLayout(
            out_features=out_features,
            in_features=in_features,
            bits=fields["bits"],
            group_size=fields["group_size"],
            stat_bits=max(fields["scale_bits"], fields["zero_bits"]),
            second_group=fields["second_group"],
        )

    def params(self, name: str) -> SpQRParams:
        """The arguments of :func:`hf_spqr.methods.spqr.quantize` for the layer called ``name``."""
        from .methods.base import SpQRParams

        fields = {key: value for key, value in self.layer_fields(name).items() if value is not None}
        return SpQRParams(**fields, mode=self.mode)
