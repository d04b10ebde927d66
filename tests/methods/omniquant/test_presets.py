from __future__ import annotations

from typing import Any

import pytest

from hf_spqr.errors import ConfigError
from hf_spqr.methods.omniquant import PRESETS, OmniQuantParams, preset


@pytest.mark.parametrize("name", PRESETS)
def test_names_say_what_they_are(name: str) -> None:
    for reference in (False, True):
        params = preset(name, reference=reference)
        group = "" if params.group_size == -1 else f"g{params.group_size}"
        assert f"W{params.bits}A{params.act_bits or 16}{group}" == name
        assert params.transforms == (params.act_bits is not None)


def test_reference_is_the_published_recipe() -> None:
    params = preset("W2A16g64", reference=True)
    assert (params.epochs, params.batch_size, params.lwc_lr, params.let_lr) == (40, 1, 1e-2, 5e-3)
    assert params.aug_loss and params.lwc and not params.rounding and not params.cosine and not params.shuffle
    assert not preset("W6A6", reference=True).aug_loss


@pytest.mark.parametrize("name", ["W4", "w4a16", "W9A16", "W4A16g", "W4A4g128"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        preset(name)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1}, {"group_size": 0}, {"act_bits": 16}, {"act_bits": 8, "group_size": 64}, {"holdout": 1.0},
        {"epochs": -1}, {"let": True, "let_alpha": ()}, {"let_pairs": ("norms",)}, {"fisher": "no"}, {"cosine": 1},
    ],
)  # fmt: skip
def test_contradictions_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OmniQuantParams(**fields)
