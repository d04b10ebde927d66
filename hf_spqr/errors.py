"""Exceptions of hf_spqr. Each says what was found and what to do about it.

Every class is an :class:`HfSpqrError` and, but for :class:`RankError`, a :class:`ValueError`, so both ``except
hf_spqr.HfSpqrError`` and the ``ValueError`` that Transformers' own quantizers raise will catch it.
"""

from __future__ import annotations

__all__ = [
    "MISFITS",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "HfSpqrError",
    "NonFiniteError",
    "RankError",
    "UnsupportedLayerError",
]


MISFITS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's own code raises when it is called with tensors of another shape, or in another way."""


class HfSpqrError(Exception):
    """Base class of everything that hf_spqr raises on purpose.

    everywhere: it is raised by every process of a group, of which it is enough that one shows it.
    """

    everywhere = False


class ConfigError(HfSpqrError, ValueError):
    """A field of a quantization config is outside its range, or two fields contradict each other."""


class CheckpointError(HfSpqrError, ValueError):
    """A packed checkpoint is incomplete, damaged, or written by another format version."""


class UnsupportedLayerError(HfSpqrError, ValueError):
    """A layer or a model has a form that the method or the packed format cannot represent."""


class CalibrationError(HfSpqrError, ValueError):
    """Calibration data is missing, too short, or does not reach a layer."""


class NonFiniteError(HfSpqrError, ValueError):
    """A weight, an activation or a Hessian contains NaN or infinity."""


class RankError(HfSpqrError, RuntimeError):
    """Another process of the group has failed; the message says which and why."""
