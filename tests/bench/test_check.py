"""The check of the doctor: silent where kernels are right, and it sees what a wrong kernel would do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_spqr import ops
from hf_spqr.bench import check
from hf_spqr.nn import AffineLinear, SpQRLinear


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    monkeypatch.setattr(check, "TOKENS", (1, 100))
    monkeypatch.setattr(check, "KINDS", (check.KINDS[0], check.KINDS[4]))


def test_right_kernels() -> None:
    found = check.check_kernels("cpu")
    assert found.wrong == []
    assert found.products == 2 * 3 * 2 + 2 * 2  # layers, dtypes, tokens; affine: integers of 8, 4 bit


@pytest.mark.skipif(not ops.COMPILED, reason="needs the compiled kernels")
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_every_level(monkeypatch, level: str) -> None:
    monkeypatch.undo()  # all layers and numbers of tokens
    try:
        before = torch.ops.hf_spqr.set_cpu_isa(level)
    except RuntimeError:
        pytest.skip(f"this machine has no {level}")
    try:
        assert check.check_kernels("cpu").wrong == []
    finally:
        torch.ops.hf_spqr.set_cpu_isa(before)


def test_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    check.check_kernels("cpu")
    assert torch.equal(torch.rand(4), expected)


def without_outliers(self: SpQRLinear, x: Tensor) -> Tensor:
    nothing = (torch.zeros_like(self.outlier_row), self.outlier[:0])
    return ops.spqr_linear(x, self.packed, *nothing, None, None, self.out_features, *self._numbers, False)


def rows_in_another_order(self: SpQRLinear, x: Tensor) -> Tensor:
    y = ops.call_linear(ops.spqr_linear, x, None, self.packed, self.outlier_row, self.outlier, None, None,
                        self.out_features, *self._numbers, False)  # fmt: skip
    return y.roll(64, dims=-1)


def last_token_is_nan(self: SpQRLinear, x: Tensor) -> Tensor:
    y = without_outliers(self, x)
    y[-1] = torch.nan
    return y


@pytest.mark.parametrize("wrong", [without_outliers, rows_in_another_order, last_token_is_nan])
def test_wrong_products_are_found(monkeypatch, wrong: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(SpQRLinear, "forward", wrong)
    found = check.check_kernels("cpu").wrong
    assert len(found) == 2 * 3
    assert all(text.startswith("spqr 3 bit g16 1.0% outliers, ") and "off by" in text for text in found)


def test_a_wrong_dense_matrix_is_found(monkeypatch) -> None:
    right = AffineLinear.dequantize_weight

    def shifted(self: AffineLinear, dtype: torch.dtype | None = None) -> Tensor:
        weight = right(self, dtype)
        return weight if self.backend == "reference" else weight.roll(1, dims=1)

    monkeypatch.setattr(AffineLinear, "dequantize_weight", shifted)
    (found,) = check.check_kernels("cpu").wrong
    assert found.startswith("affine 4 bit g128, as a dense matrix: off by")


def test_integers_must_be_equal(monkeypatch) -> None:
    right = AffineLinear.forward

    def nearly(self: AffineLinear, x: Tensor) -> Tensor:
        y = right(self, x)
        return y if self.backend == "reference" else y * (1 + 2**-22)

    monkeypatch.setattr(AffineLinear, "forward", nearly)
    found = check.check_kernels("cpu").wrong
    assert found == [
        f"affine 4 bit g128, {tokens} tokens, integers of {act_bits} bit" for act_bits in (8, 4) for tokens in (1, 100)
    ]
