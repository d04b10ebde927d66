"""Random packed matrices for tests."""

import torch

from hf_spqr.formats import affine, spqr


def random_spqr(layout: spqr.SpQRLayout, share: float = 0.05, perm: bool = False, seed: int = 0) -> spqr.SpQRWeight:
    gen = torch.Generator().manual_seed(seed)
    n, k = layout.out_features, layout.in_features
    row, col = (torch.rand(n, k, generator=gen) < share).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=n).cumsum(0)

    def codes(bits: int, width: int) -> torch.Tensor:
        return torch.randint(0, 1 << bits, (n, width), dtype=torch.uint8, generator=gen)

    return spqr.SpQRWeight(
        layout=layout,
        codes=codes(layout.bits, k),
        scale_codes=codes(layout.stat_bits, layout.groups),
        zero_codes=codes(layout.stat_bits, layout.groups),
        second=torch.randn(layout.row_blocks, layout.second_groups, 4, generator=gen).half(),
        outlier_row=torch.cat([torch.zeros(1, dtype=torch.int64), counts]).int(),
        outlier_col=col.int(),
        outlier_value=torch.randn(len(col), generator=gen).half(),
        perm=torch.randperm(k, generator=gen).int() if perm else None,
    )


def random_affine(layout: affine.AffineLayout, perm: bool = False, seed: int = 0) -> affine.AffineWeight:
    gen = torch.Generator().manual_seed(seed)
    n, k = layout.out_features, layout.in_features

    def codes(width: int) -> torch.Tensor:
        return torch.randint(0, 1 << layout.bits, (n, width), dtype=torch.uint8, generator=gen)

    return affine.AffineWeight(
        layout=layout,
        codes=codes(k),
        scales=torch.randn(n, layout.groups, generator=gen).to(layout.scale_dtype),
        zeros=None if layout.symmetric else codes(layout.groups),
        perm=torch.randperm(k, generator=gen).int() if perm else None,
    )
