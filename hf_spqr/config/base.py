"""What the quantization configs share: validation, selection of layers, versions, serialization.

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

from hf_spqr.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from hf_spqr.formats.affine import AffineLayout
    from hf_spqr.formats.spqr import SpQRLayout

__all__ = [
    "FORMAT_VERSION",
    "GROUP_SIZES",
    "PackedConfig",
    "check_choice",
    "check_flag",
    "check_int",
    "check_number",
    "name_matches",
]

FORMAT_VERSION = 1
"""Version of the packed format (docs/format.md) that this code reads and writes."""

BACKENDS = ("auto", "reference", "int8_activations")
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
    backend: Literal["auto", "reference", "int8_activations"]
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

    def settle(self) -> None:
        """Replace fields that were left to the method by its values: the config is a record of how a file was made."""

    def stores_order(self, *names: str) -> bool | None:
        """Whether the layer that goes by ``names`` has columns in an order of its own; None if that is not known."""
        return None

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
