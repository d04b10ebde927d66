"""Packed experts: the function of the original module on the dequantized weights, for every layout that models use."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from hf_spqr.errors import CheckpointError
from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.nn import AffineGroupedLinear, AffineLinear, PackedExperts, SpQRGroupedLinear, SpQRLinear
from hf_spqr.nn.experts import describe, pack_experts
from tests.weights import random_affine, random_spqr

EXPERTS, HIDDEN, INNER = 5, 64, 48


class Config:
    _experts_implementation = "eager"


def experts_module(gated=True, transposed=False, interleaved=False, biased=False) -> nn.Module:
    """A random experts module as models of Transformers define them."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = EXPERTS
            self.act_fn = nn.SiLU()
            rows = 2 * INNER if gated else INNER
            name = "gate_up_proj" if gated else "up_proj"

            def weight(o, i):
                return nn.Parameter(torch.randn(EXPERTS, *((i, o) if transposed else (o, i))) / i**0.5)

            setattr(self, name, weight(rows, HIDDEN))
            self.down_proj = weight(HIDDEN, INNER)
            if biased:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))
                self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

        if interleaved:

            def _apply_gate(self, y):
                return y[..., ::2].sigmoid() * y[..., 1::2]

        def forward(self, hidden_states, top_k_index, top_k_weights):
            first = self.gate_up_proj if gated else self.up_proj
            name = "gate_up_proj" if gated else "up_proj"
            out = torch.zeros_like(hidden_states)
            for e in range(EXPERTS):
                token, k = torch.where(top_k_index == e)
                y = hidden_states[token] @ (first[e] if transposed else first[e].T)
                y = y + getattr(self, f"{name}_bias")[e] if biased else y
                y = self._apply_gate(y) if gated else self.act_fn(y)
                y = y @ (self.down_proj[e] if transposed else self.down_proj[e].T)
                y = y + self.down_proj_bias[e] if biased else y
                out.index_add_(0, token, y * top_k_weights[token, k, None])
            return out

    torch.manual_seed(0)
    wrap = use_experts_implementation(
        has_gate=gated, is_transposed=transposed, is_concatenated=not interleaved, has_bias=biased
    )
    return wrap(Experts)(Config()).requires_grad_(False)


def grouped_linear(kind: str, n: int, k: int, perm: bool = False):
    if kind == "spqr":
        layout = SpQRLayout(n, k)
        experts = [spqr.pack(random_spqr(layout, 0.02 * e, perm, e)) for e in range(EXPERTS)]
        return SpQRGroupedLinear.join(layout, experts), experts
    layout = AffineLayout(n, k, 4, 16)
    experts = [affine.pack(random_affine(layout, perm, e)) for e in range(EXPERTS)]
    return AffineGroupedLinear.join(layout, experts), experts


LAYOUTS = {
    "mixtral": {},
    "gpt_oss": {"transposed": True, "interleaved": True, "biased": True},
    "aria": {"transposed": True},
    "biased": {"biased": True},
    "nemotron": {"gated": False},
}


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def routing(tokens=17, k=2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=gen)[:k] for _ in range(tokens)])  # last: never used
    return torch.randn(tokens, HIDDEN, generator=gen), index, torch.rand(tokens, k, generator=gen)


def packed_pair(layout: str, kind: str = "spqr", perm: bool = False):
    """A packed module and the original class with the same weights in full."""
    module = experts_module(**LAYOUTS[layout])
    shapes = describe(module).projections
    packed = pack_experts(module, {p: grouped_linear(kind, n, k, perm)[0] for p, (n, k) in shapes.items()})
    return packed, packed.to_experts(torch.float32)


@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("kind", ["spqr", "affine"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_function_as_the_original_module(layout, kind, perm):
    packed, plain = packed_pair(layout, kind, perm)
    assert isinstance(packed, PackedExperts) and isinstance(packed, type(plain)) and type(plain) is not type(packed)
    expected = plain(*routing())
    close(packed(*routing()), expected)
    for linear in packed.linears().values():
        linear.backend = "reference"
    close(packed(*routing()), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_view_and_join_are_inverse(layout):
    module = experts_module(**LAYOUTS[layout])
    kind = describe(module)
    packed = pack_experts(module, {p: grouped_linear("spqr", n, k)[0] for p, (n, k) in kind.projections.items()})
    plain = packed.to_experts(torch.float32)
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
    for name, linear in packed.linears().items():
        assert torch.equal(kind.view(plain, name), linear.dequantize_weight(torch.float32))


@pytest.mark.parametrize("nobody", [EXPERTS, EXPERTS + 3, -1, -EXPERTS])
@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
def test_rows_of_no_expert_give_zeros(layout, nobody):
    packed, plain = packed_pair(layout)
    hidden, index, weights = routing()
    index[3, 1] = nobody  # E is what expert parallelism writes for experts of other ranks
    expected = plain(hidden, index, weights)
    close(packed(hidden, index, weights), expected)


def test_presorted_rows_without_an_index():
    packed, plain = packed_pair("aria")
    rows = torch.randn(EXPERTS, 7, HIDDEN)
    rows[1:, 2:] = 0
    y = torch.bmm(rows, plain.gate_up_proj)
    expected = torch.bmm(plain._apply_gate(y), plain.down_proj).flatten(0, 1)
    close(packed(rows.flatten(0, 1)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_single_token(dtype):
    packed, _ = packed_pair("mixtral")
    hidden, index, weights = routing(1)
    packed.to(dtype)
    assert packed.packed["gate_proj"].packed.dtype == torch.int32 and packed.down_proj.dtype == dtype
    assert packed((hidden / 64).to(dtype), index, weights.to(dtype)).dtype == dtype
    assert packed(hidden[:0].to(dtype), index[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("kind", ["spqr", "affine"])
def test_gradient_reaches_the_hidden_states(kind):
    packed, plain = packed_pair("gpt_oss", kind)
    hidden, index, weights = routing()
    hidden *= 0.01  # gates that do not saturate: a step would turn 2e-5 in its input into any error of the gradient
    upstream, grads = torch.randn_like(hidden), []
    for module in (packed, plain):
        x = hidden.clone().requires_grad_()
        module(x, index, weights).backward(upstream)
        grads.append(x.grad)
    close(*grads)


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
def test_compiles_in_one_graph_with_and_without_gradient(layout):
    packed, _ = packed_pair(layout)
    hidden, index, weights = routing()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = hidden.clone().requires_grad_()
    torch.testing.assert_close(compiled(x, index, weights), packed(x, index, weights))
    compiled(x, index, weights).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, index, weights), packed(x, index, weights))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("kind", ["spqr", "affine"])
def test_opcheck(kind, transpose):
    linear, _ = grouped_linear(kind, 32, 64, perm=True)
    x = torch.randn(9, 32 if transpose else 64, requires_grad=True)
    ends = torch.tensor([2, 2, 5, 6, 8])
    arguments = (x, ends, *linear.packed_tensors().values(), 32, 64, *linear._numbers, False, transpose)
    torch.library.opcheck(type(linear).linear, arguments)
    weight = linear.dequantize_weight(torch.float32)
    owners = weight[[0, 0, 2, 2, 2, 3, 4, 4]]
    y = type(linear).linear(*arguments)
    close(y[:8], torch.einsum("so,soi->si" if transpose else "si,soi->so", x[:8], owners))
    assert not y[8:].any()


@pytest.mark.parametrize("kind", ["spqr", "affine"])
def test_int8_activations_of_each_expert_are_those_of_its_layer(kind):
    linear, experts = grouped_linear(kind, 48, 96, True)
    linear.backend = "int8_activations"
    single = {"spqr": SpQRLinear, "affine": AffineLinear}[kind]
    x = torch.randn(12, 96, requires_grad=True)
    y = linear(x, torch.tensor([5, 5, 5, 12, 12])[:EXPERTS])
    for rows, expert in ((slice(0, 5), 0), (slice(5, 12), 3)):
        layer = single(linear.layout, experts[expert], dtype=torch.float32, backend="int8_activations")
        assert torch.equal(y[rows], layer(x[rows]))
    y.sum().backward()
    weight = linear.dequantize_weight(torch.float32)
    close(x.grad, weight[[0] * 5 + [3] * 7].sum(1))


@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("kind", ["spqr", "affine"])
def test_split_gives_back_every_expert_to_the_bit(kind, perm):
    linear, experts = grouped_linear(kind, 48, 96, perm)
    assert len(linear.split()) == EXPERTS
    for got, expected in zip(linear.split(), experts, strict=True):
        assert got.keys() == expected.keys() and all(torch.equal(got[n], t) for n, t in expected.items())
    single = {"spqr": SpQRLinear, "affine": AffineLinear}[kind]
    weight = linear.dequantize_weight(torch.float32)
    for expert, tensors in enumerate(experts):
        assert torch.equal(single(linear.layout, tensors, dtype=torch.float32).dequantize_weight(), weight[expert])


def test_empty_has_the_shapes_of_the_file_and_refuses_others():
    linear, experts = grouped_linear("spqr", 48, 96, True)
    specs = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in experts]
    empty = SpQRGroupedLinear.empty(linear.layout, specs)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in linear.state_dict().items()}
    del specs[3]["perm"]
    with pytest.raises(CheckpointError, match="perm"):
        SpQRGroupedLinear.empty(linear.layout, specs)


def test_check_finds_damage():
    linear, _ = grouped_linear("spqr", 48, 96)
    linear.check()
    linear.outlier_row.data[1, -1] += 1
    with pytest.raises(CheckpointError, match="damaged"):
        linear.check()
    with pytest.raises(RuntimeError, match="damaged packed experts"):
        linear.load_state_dict(linear.state_dict())
    layout = AffineLayout(48, 96, 4, -1)
    experts = AffineGroupedLinear.join(layout, [affine.pack(random_affine(layout, seed=e)) for e in range(EXPERTS)])
    experts.check()
    experts.packed.data[1, 2, 3] |= 1 << 20
    with pytest.raises(CheckpointError, match="damaged packed experts: a zero point does not fit 4 bits"):
        experts.check()


def test_deepcopy_and_pickle_keep_every_bit():
    packed, _ = packed_pair("gpt_oss")
    other = copy.deepcopy(packed)
    assert torch.equal(other(*routing()), packed(*routing()))
    assert other.packed["down_proj"].packed.data_ptr() != packed.packed["down_proj"].packed.data_ptr()
    buffer = io.BytesIO()
    torch.save(packed.packed, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in packed.packed.state_dict().items())


def test_what_is_no_experts_module():
    assert describe(nn.Linear(4, 4)) is None
    module = experts_module()
    module.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INNER + 1))
    assert describe(module) is None


@pytest.mark.parametrize("kind", ["spqr", "affine"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_held_experts_add_up(layout, kind):
    """What ranks give that hold some of the experts each, as a load leaves them, adds up to the whole."""
    packed, _ = packed_pair(layout, kind)
    total = 0
    for first, last in ((0, 2), (2, EXPERTS)):
        part = copy.deepcopy(packed)
        part.hold(first, last)
        for name, linear in part.linears().items():
            whole = packed.linears()[name]
            experts = whole.split()[first:last]
            for tensor, value in type(whole).join(whole.layout, experts).packed_tensors().items():
                assert tensor in linear.ragged or linear.get_parameter(tensor).shape == value.shape
                setattr(linear, tensor, nn.Parameter(value, requires_grad=False))
        part.check()
        total = total + part(*routing())
    close(total, packed(*routing()))
