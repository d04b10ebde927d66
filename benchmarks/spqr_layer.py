"""SpQR on the synthetic layer: the published settings, the default, what each of its choices gives, sizes, and time.

    python -m benchmarks.spqr_layer accuracy --shared ../shared
    python -m benchmarks.spqr_layer choices --shared ../shared
    python -m benchmarks.spqr_layer sizes --shared ../shared
    python -m benchmarks.spqr_layer time --shared ../shared

Error: ||X W - X W_q|| / ||X W||, on the 4096 tokens of the Hessian (fit) and on 2048 others (held-out). Bits per
weight: of the paper (codes + statistics + 32 per outlier), and of the file (all packed tensors).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import save
from benchmarks.spqr_sizes import WAYS
from hf_spqr.formats import spqr as spqr_format
from hf_spqr.formats.columns import nbytes
from hf_spqr.formats.spqr import SpQRWeight
from hf_spqr.methods import spqr, spqr_fit, spqr_reference
from hf_spqr.methods.base import SpQRParams
from hf_spqr.methods.descent import descend
from hf_spqr.methods.loop import State, propagate
from hf_spqr.methods.order import activation_order, plan_by_energy, plan_in_place
from hf_spqr.methods.solve import damped, inverse_factor

Layer = tuple[Tensor, Tensor, Tensor, Tensor]
Method = Callable[[Tensor, Tensor, SpQRParams], SpQRWeight]


def load(shared: Path, size: int, seed: int) -> Layer:
    """Weight, inputs, held-out inputs, Hessian."""
    spec = importlib.util.spec_from_file_location("synthetic_layer", shared / "fixtures" / "synthetic_layer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = module.synthetic_layer(size, size, 4096, seed)
    return data["W"], data["X"], data["X_eval"], data["X"].T @ data["X"]


def file_bits(weight: SpQRWeight) -> float:
    return 8 * nbytes(spqr_format.pack(weight)) / (weight.layout.out_features * weight.layout.in_features)


def paper_bits(weight: SpQRWeight) -> float:
    layout = weight.layout
    share = weight.outlier_col.numel() / (layout.out_features * layout.in_features)
    return layout.bits + 6 / layout.group_size + 64 / (layout.group_size * layout.second_group) + 32 * share


def measure(layer: Layer, quantized: SpQRWeight) -> dict[str, float]:
    weight, inputs, held_out, _ = layer
    difference = quantized.dequantize() - weight
    fit, other = (float((difference @ x.T).norm() / (weight @ x.T).norm()) for x in (inputs, held_out))
    return {"fit": fit, "held_out": other, "paper_bits": paper_bits(quantized), "file_bits": file_bits(quantized)}


def whole(weight: Tensor, hessian: Tensor, params: SpQRParams) -> SpQRWeight:
    result = spqr.quantize(weight, hessian, params).weight
    assert isinstance(result, SpQRWeight)
    return result


def pieces(*, fit: Any, by_energy: bool, passes: int, refit: bool = False) -> Method:
    """SpQR put together from its parts, for comparisons that `spqr.quantize` does not offer."""

    def quantize(weight: Tensor, hessian: Tensor, params: SpQRParams) -> SpQRWeight:
        rows, columns = weight.shape
        assert rows % 16 == 0
        layout, diagonal = params.layout(rows, columns), hessian.diagonal()
        perm = activation_order(diagonal) if params.permutes else None
        plan = plan_in_place(columns, params.group_size, layout.groups_per_second)
        if by_energy:
            plan = plan_by_energy(diagonal, params.group_size, layout.groups_per_second)
        way = plan.columns if perm is None else perm
        ordered = hessian[way][:, way]
        factor = inverse_factor(ordered, params.damping)
        work = weight.T[way].contiguous()
        threshold = spqr.absolute_threshold(work, factor.upper, params.outlier_threshold)
        state = propagate(
            work.clone(), factor.upper, plan, params.bits, lambda g, c: fit(g, c, threshold, params), threshold
        )
        target = damped(ordered, factor.percdamp)
        for _ in range(passes):
            descend(state, work, target, plan, params.bits)
        if refit:
            refit_outliers(state, work, target)
        return spqr.assemble(state, layout, plan, perm)

    return quantize


def refit_outliers(state: State[Any], original: Tensor, hessian: Tensor) -> None:
    """Least squares for the outliers of each row, given its codes: the loss is quadratic in them."""
    distance = state.quantized() - original
    gradient = hessian @ distance
    for row in range(original.shape[1]):
        at = state.outlier[:, row]
        if bool(at.any()):
            state.value[at, row] -= torch.linalg.solve(hessian[at][:, at], gradient[at, row])


def at_bits(
    method: Method, layer: Layer, size: float, /, count: Callable[[SpQRWeight], float] = file_bits, **fields: Any
) -> dict[str, float]:
    """The smallest threshold that stays within `size` bits per weight, in the file or as `count` counts."""
    low, high = 0.01, 20.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        tried = method(layer[0], layer[3], SpQRParams(outlier_threshold=middle, **fields))
        low, high = (middle, high) if count(tried) > size else (low, middle)
    found = measure(layer, method(layer[0], layer[3], SpQRParams(outlier_threshold=high, **fields)))
    return {"outlier_threshold": high, **found}


def accuracy(shared: Path) -> list[dict[str, Any]]:
    published: list[dict[str, Any]] = [
        {"percdamp": 1.0},
        {"percdamp": 0.01},
        {"percdamp": 1.0, "outlier_threshold": 1.0},
        {"percdamp": 1.0, "outlier_threshold": math.inf},
        {"percdamp": 1.0, "bits": 4},
    ]
    rows = []
    for seed in range(3):
        layer = load(shared, 512, seed)
        for fields in published:
            found = measure(layer, whole(layer[0], layer[3], SpQRParams(mode="reference", **fields)))
            rows.append({"seed": seed, "mode": "reference", "fields": {k: str(v) for k, v in fields.items()}, **found})
        for mode in ("reference", "default"):
            rows.append({"seed": seed, "mode": f"{mode} at 4.0 bits", **at_bits(whole, layer, 4.0, mode=mode)})
        for bits in (3, 4):
            found = measure(layer, whole(layer[0], layer[3], SpQRParams(bits=bits)))
            rows.append({"seed": seed, "mode": "default", "fields": {"bits": str(bits)}, **found})
    return rows


def choices(shared: Path) -> list[dict[str, Any]]:
    old, new = spqr_reference.fit_unit, spqr_fit.fit_unit
    tried: list[tuple[str, Method, dict[str, Any]]] = [
        ("published", pieces(fit=old, by_energy=False, passes=0), {"percdamp": 1.0, "act_order": True}),
        ("damping 0.1", pieces(fit=old, by_energy=False, passes=0), {"percdamp": 0.1, "act_order": True}),
        ("damping 0.03", pieces(fit=old, by_energy=False, passes=0), {"act_order": True}),
        ("damping 0.01", pieces(fit=old, by_energy=False, passes=0), {"percdamp": 0.01, "act_order": True}),
        ("no order", pieces(fit=old, by_energy=False, passes=0), {}),
        ("groups in place, by energy", pieces(fit=old, by_energy=True, passes=0), {}),
        ("new statistics, permuted", pieces(fit=new, by_energy=False, passes=0), {"act_order": True}),
        ("new statistics, no order", pieces(fit=new, by_energy=False, passes=0), {}),
        ("new statistics, by energy", pieces(fit=new, by_energy=True, passes=0), {}),
        ("... + least squares", pieces(fit=new, by_energy=True, passes=0, refit=True), {}),
        ("... + 1 descent (the default)", pieces(fit=new, by_energy=True, passes=1), {}),
        ("... + 1 descent, least squares", pieces(fit=new, by_energy=True, passes=1, refit=True), {}),
        ("... + 2 descents", pieces(fit=new, by_energy=True, passes=2), {}),
        ("default, permuted", whole, {"act_order": True}),
        ("default, damping 0.1", whole, {"percdamp": 0.1}),
        ("default, damping 0.01", whole, {"percdamp": 0.01}),
        ("default, second_group 32", whole, {"second_group": 32}),
    ]
    layers = {seed: load(shared, 512, seed) for seed in (0, 1)}
    return [
        {"choice": name, "seed": seed, **at_bits(method, layer, 4.0, **fields)}
        for name, method, fields in tried
        for seed, layer in layers.items()
    ]


def sizes(shared: Path) -> list[dict[str, Any]]:
    """The alternatives of benchmarks/spqr_sizes.py, at sizes of wide layers."""
    rows = []
    for seed in (0, 1):
        layer = load(shared, 512, seed)
        for size, ways in WAYS.items():
            for way, (bits, group_size) in ways.items():
                found = at_bits(whole, layer, size, paper_bits, bits=bits, group_size=group_size)
                rows.append({"seed": seed, "size": size, "way": way, "bits": bits, "group_size": group_size, **found})
    return rows


def timing(shared: Path) -> list[dict[str, Any]]:
    rows = []
    for size in (256, 512, 1024, 2048):
        weight, _, _, hessian = load(shared, size, 0)
        other = torch.randn(size, size)
        for mode in ("reference", "default"):
            best = math.inf
            for _ in range(4):
                start = time.process_time()
                spqr.quantize(weight, hessian, SpQRParams(mode=mode))
                best = min(best, time.process_time() - start)
            start = time.process_time()
            torch.mm(other, other)
            rows.append(
                {
                    "size": size,
                    "mode": mode,
                    "cpu_seconds": best,
                    "one_matmul_of_the_size": time.process_time() - start,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "choices", "sizes", "time"])
    parser.add_argument("--shared", type=Path, required=True, help="folder with fixtures/synthetic_layer.py")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/spqr_layer_<what>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {"accuracy": accuracy, "choices": choices, "sizes": sizes, "time": timing}[arguments.what](arguments.shared)
    show(rows)
    if arguments.save:
        save(f"spqr_layer_{arguments.what}", {"rows": rows})
