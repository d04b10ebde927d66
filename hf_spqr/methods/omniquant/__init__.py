"""OmniQuant (arXiv 2308.13137): block-wise learned grids, rounding and equivalent transforms."""

from .pairs import EquivalencePair
from .params import OmniQuantParams
from .presets import PRESETS, preset
from .propose import find_pairs
from .result import BlockResult
from .train import quantize_block

__all__ = ["PRESETS", "BlockResult", "EquivalencePair", "OmniQuantParams", "find_pairs", "preset", "quantize_block"]
