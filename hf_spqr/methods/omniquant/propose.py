"""Find the equivalent transforms of a block by measuring it (no architecture is named anywhere).

Propose: multiply the output channels of one module by random factors and look at the inputs of all others. Where every
channel of an input is multiplied by exactly one of the factors, that module is a consumer, and which factor it got is
the index map (identity for norm -> linear, repeated heads for v -> o under grouped-query attention). What feeds
nothing proportionally may be a query or a key: those are tried against each other under the ways rotary embeddings
tie channels.
Verify: apply random scales and shifts to the parameters, in float64, and compare the block's output. A pair that moves
it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pairs import EquivalencePair, ScaleSite, ShiftSite, apply_pair
from .probe import Probe, measured_index
from .rotary import head_sizes, key_query_ties


@dataclass(frozen=True)
class Port:
    """Output channels ``rows`` of a module: where a factor can be written into parameters.

    dim: output dimension of the weight; bias: name or None; offset: 1 for ``(1 + w)`` norms; norm: whether the weight
    is a vector; rows: int64 positions in the output, None for all.
    """

    module: str
    weight: str
    dim: int
    outputs: int
    bias: str | None
    offset: float
    norm: bool
    rows: Tensor | None = None

    @property
    def size(self) -> int:
        return self.outputs if self.rows is None else len(self.rows)

    def index(self, entries: Tensor | None = None) -> Tensor | None:
        """Entry of the scale for each output position (-1 for positions outside ``rows``)."""
        if self.rows is None:
            return entries
        full = torch.full((self.outputs,), -1, dtype=torch.int64, device=self.rows.device)
        full[self.rows] = torch.arange(len(self.rows), device=self.rows.device) if entries is None else entries
        return full

    def sites(self, power: int, entries: Tensor | None = None) -> list[ScaleSite]:
        index = self.index(entries)
        sites = [ScaleSite(self.weight, self.dim, index, power, self.offset)]
        return [*sites, ScaleSite(self.bias, 0, index, power)] if self.bias else sites


def find_pairs(
    block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], *, seed: int = 0
) -> tuple[list[EquivalencePair], list[str]]:
    """Verified pairs of ``block``, and the names of proposals that did not verify.

    hidden ``[B, T, H]`` and kwargs are one recorded call of the block (a dozen tokens are enough); the block is run in
    float64 some 10 to 60 times and is left as it was. A block that cannot run in float64 has no verifiable pair: the
    list is empty and the second one tells the reason.
    """
    try:
        probe = Probe(block, hidden, kwargs, seed)
    except RuntimeError as error:
        return [], [f"the block does not run in float64: {error}"]
    ports = [port for name in dict.fromkeys(probe.called) if (port := _port(probe, name))]
    pairs: list[EquivalencePair] = []
    rejected: list[str] = []
    lonely: list[Port] = []
    for port in ports:
        for part in _parts(probe, port):
            proposal = _consumed(probe, part)
            if proposal is None:
                continue
            verified = _verified(probe, proposal)
            if verified:
                pairs.append(verified)
                if part.rows is not None and not part.norm:
                    lonely.extend(_rest(part))
                break
            rejected.append(proposal.name)
        else:
            lonely.append(port)
    for query, key in _candidates(probe, lonely):
        ties = key_query_ties(query.size, key.size, head_sizes(block, key.size), query.norm)
        device = probe.hidden.device
        matches = (_verified(probe, _against(query, key, q.to(device), k.to(device), n)) for q, k, n in ties)
        pair = next((match for match in matches if match), None)
        if pair:
            pairs.append(pair)
        else:
            rejected.append(f"{query.module} <-> {key.module}")
    return _together(probe, pairs, rejected), rejected


def _port(probe: Probe, name: str) -> Port | None:
    """Where the output of a module can be scaled in its parameters, found by trying; None if it cannot."""
    module, out = probe.modules[name], probe.outputs.get(name)
    weight = probe.tensors.get(f"{name}.weight")
    if out is None or weight is None or name not in probe.inputs:
        return None
    width, has_bias = out.shape[-1], f"{name}.bias" in probe.tensors
    bias = probe.tensors[f"{name}.bias"] if has_bias else None
    x = probe.inputs[name]
    base = Port(name, f"{name}.weight", 0, width, f"{name}.bias" if has_bias else None, 0.0, weight.dim() == 1)
    if weight.dim() == 1 and weight.numel() == width:
        plain = out - bias if bias is not None else out
        for offset in (0.0, 1.0):
            unit = plain / (weight + offset)  # is the output (weight + offset) times something weight-free?
            changed = {**_own(probe, name), "weight": weight * 1.5 + 0.25}
            with torch.no_grad():
                again = torch.func.functional_call(module, changed, (x,))
            again = again - bias if bias is not None else again
            if torch.allclose(again, unit * (weight * 1.5 + 0.25 + offset), rtol=1e-4, atol=1e-6):
                return replace(base, offset=offset)
    if weight.dim() == 2 and weight.shape == (width, x.shape[-1]) and torch.allclose(F.linear(x, weight, bias), out):
        return base
    if weight.dim() == 2 and weight.shape == (x.shape[-1], width) and torch.allclose(F.linear(x, weight.T, bias), out):
        return replace(base, dim=1)
    return None


def _own(probe: Probe, name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in probe.tensors.items() if key.startswith(prefix)}


def _parts(probe: Probe, port: Port) -> Iterator[Port]:
    """The whole output first, then the slices of a fused projection: of each ``m`` runs of rows the last, or the
    first.

    Covers [q|k|v], per head or group, [gate|up] in both orders and interleaved, for every consumer width that fits.
    """
    yield port
    if port.norm:
        return
    device = probe.hidden.device
    after = probe.called[probe.called.index(port.module) + 1 :]
    widths = {probe.inputs[name].shape[-1] for name in after if name in probe.inputs}
    for width in sorted(widths):
        if port.outputs == 2 * width:
            halves = torch.arange(port.outputs, device=device)
            for rows in (halves[width:], halves[:width], halves[1::2], halves[0::2]):
                yield replace(port, rows=rows)
        values, rest = divmod(port.outputs - width, 2)
        if rest or values < 1 or width % values:
            continue
        runs = width // values + 2
        for head in [values, *head_sizes(probe.block, values)]:
            if values % head == 0:
                rows = torch.arange(port.outputs, device=device).view(values // head, runs, head)[:, -1].reshape(-1)
                yield replace(port, rows=rows)


def _rest(part: Port) -> list[Port]:
    """Query and key rows of a fused projection whose value rows are known."""
    assert part.rows is not None
    values = part.size
    runs = part.outputs // values
    if part.outputs % values or runs < 3:
        return []
    gaps = (part.rows[1:] - part.rows[:-1] != 1).nonzero()
    head = int(gaps[0]) + 1 if len(gaps) else values
    rows = torch.arange(part.outputs, device=part.rows.device).view(values // head, runs, head)
    queries, keys = rows[:, : runs - 2].reshape(-1), rows[:, runs - 2].reshape(-1)
    return [replace(part, rows=queries), replace(part, rows=keys)]


def _consumed(probe: Probe, port: Port) -> EquivalencePair | None:
    """The pair of a port with every module whose input follows it proportionally, or None if there is none."""
    factors = probe.random(port.size)
    vector = torch.ones(port.outputs, dtype=torch.float64, device=factors.device)
    vector[slice(None) if port.rows is None else port.rows] = factors
    after = probe.recorded((port.module, vector))
    scales, shifts, names, all_biased = port.sites(-1), [], [], port.bias is not None
    for name, before in probe.inputs.items():
        index = None if name == port.module or name not in after else measured_index(before, after[name], factors)
        if index is None:
            continue
        found = list(_consumer_sites(probe, name, None if _is_identity(index, port.size) else index))
        if not found:  # a container that hands its input on, or one that no parameter can make up for: verified later
            continue
        names.append(name)
        scales.extend(found)
        bias = f"{name}.bias"
        if len(found) == 1 and bias in probe.tensors and probe.tensors[found[0].param].dim() == 2:
            shifts.append(ShiftSite(bias, found[0].index, found[0].param, found[0].dim))
        else:
            all_biased = False
    if not names:
        return None
    kind = "norm" if port.norm else "mlp" if _is_mlp(probe, port, names[0]) else "value"
    if port.bias and all_biased:
        shifts.append(ShiftSite(port.bias, port.index()))
    label = f"{port.module} -> {', '.join(names)}"
    return EquivalencePair(label, kind, port.size, tuple(scales), tuple(shifts) if all_biased else ())


def _is_identity(index: Tensor, size: int) -> bool:
    return len(index) == size and bool((index == torch.arange(size, device=index.device)).all())


def _is_mlp(probe: Probe, port: Port, consumer: str) -> bool:
    """Whether tokens stay apart between the two (else attention lies between, and the channel is a value)."""
    x = probe.outputs[port.module]
    if x.dim() < 2 or x.shape[-2] < 2:
        return True
    only_first = torch.ones_like(x)
    only_first[..., :1, :] = 2.0
    after = probe.recorded((port.module, only_first)).get(consumer)
    before = probe.inputs[consumer]
    if after is None or after.shape != before.shape:
        return False
    return bool(torch.equal(after[..., 1:, :], before[..., 1:, :]))


def _consumer_sites(probe: Probe, name: str, index: Tensor | None) -> Iterator[ScaleSite]:
    """The parameters that a module contracts with its input: columns of a linear, or last dimension of stacked
    ones."""
    width = probe.inputs[name].shape[-1]
    port = _port(probe, name)
    if port is not None:
        if not port.norm:
            yield ScaleSite(port.weight, 1 - port.dim, index, 1)
        return
    owned = {key for key in probe.tensors if key.startswith(f"{name}.") and "." not in key[len(name) + 1 :]}
    for key in sorted(owned):
        value = probe.tensors[key]
        if value.dim() >= 2 and value.shape[-1] == width and "down" not in key:
            yield ScaleSite(key, value.dim() - 1, index, 1)
        elif value.dim() == 3 and value.shape[1] == width and "down" not in key:
            yield ScaleSite(key, 1, index, 1)


def _candidates(probe: Probe, lonely: list[Port]) -> Iterator[tuple[Port, Port]]:
    """Query and key: linears with the same input, or norms called one after the other, that feed nothing directly."""
    linears = [port for port in lonely if not port.norm]
    for i, first in enumerate(linears):
        for second in linears[i + 1 :]:
            if torch.equal(probe.inputs[first.module], probe.inputs[second.module]):
                yield (first, second) if first.size >= second.size else (second, first)
    norms = [port for port in lonely if port.norm]
    for first, second in pairwise(norms):
        yield (first, second) if first.size >= second.size else (second, first)


def _against(query: Port, key: Port, query_entries: Tensor, key_entries: Tensor, size: int) -> EquivalencePair:
    sites = query.sites(-1, query_entries) + key.sites(1, key_entries)
    return EquivalencePair(f"{query.module} <-> {key.module}", "qk", size, tuple(sites))


def _verified(probe: Probe, pair: EquivalencePair) -> EquivalencePair | None:
    """The pair, without its shifts if only those fail, or None."""
    scale = probe.random(pair.size)
    try:
        if not probe.unchanged(apply_pair(pair, probe.tensors, scale)):
            return None
        if pair.shifts:
            shift = probe.random(pair.size) - 1
            if not probe.unchanged(apply_pair(pair, probe.tensors, scale, shift)):
                return replace(pair, shifts=())
    except (RuntimeError, IndexError):  # the sites do not fit the shapes: not a transform of this block
        return None
    return pair


def _together(probe: Probe, pairs: list[EquivalencePair], rejected: list[str]) -> list[EquivalencePair]:
    """The pairs that also hold one after the other, each on top of those before it."""
    kept: list[EquivalencePair] = []
    tensors = dict(probe.tensors)
    for pair in pairs:
        scale, shift = probe.random(pair.size), probe.random(pair.size) - 1 if pair.shifts else None
        trial = {**tensors, **apply_pair(pair, tensors, scale, shift)}
        if probe.unchanged(trial):
            tensors, kept = trial, [*kept, pair]
        else:
            rejected.append(pair.name)
    return kept
