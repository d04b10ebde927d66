"""Quantize a whole model in place, block by block."""

from hf_spqr.quantize.driver import quantize_model
from hf_spqr.quantize.targets import Target, find_targets

__all__ = ["Target", "find_targets", "quantize_model"]
