"""GPTQ v2 and compressed-tensors against decoders written from their descriptions and against their own library."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_spqr.formats import bitstream, compressed_tensors, gptq_v2
from hf_spqr.formats.affine import AffineLayout
from tests.weights import random_affine


def stream(words: list[int], bits: int, count: int) -> list[int]:
    """The codes in a row of words, as one large number."""
    whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(whole >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 5), st.integers(1, 100)), bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_bitstream(size, bits, seed):
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, size, dtype=torch.uint8, generator=gen)
    words = bitstream.pack_bits(codes, bits)
    assert words.shape == (size[0], -(-size[1] * bits // 32))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        assert stream(packed, bits, size[1]) == row
    assert torch.equal(bitstream.unpack_bits(words, bits, size[1]), codes)


def gptq_by_hand(tensors, bits):
    """[N, K] from GPTQ v2 tensors, element by element."""
    scales, group = tensors["scales"].double(), tensors["g_idx"].tolist()
    rows = scales.shape[1]
    zeros = [stream(words, bits, rows) for words in tensors["qzeros"].tolist()]
    out = torch.zeros(rows, len(group), dtype=torch.float64)
    for n in range(rows):
        codes = stream(tensors["qweight"][:, n].tolist(), bits, len(group))
        for k, code in enumerate(codes):
            out[n, k] = scales[group[k], n] * (code - zeros[group[k]][n])
    return out


@pytest.mark.parametrize("bits", gptq_v2.BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group_size", "perm"), [(-1, False), (32, False), (16, True), (-1, True)])
def test_gptq_v2(bits, symmetric, group_size, perm):
    weight = random_affine(AffineLayout(32, 96, bits, group_size, symmetric), perm)
    tensors = gptq_v2.encode(weight)
    expected = weight.dequantize()
    torch.testing.assert_close(gptq_by_hand(tensors, bits).float(), expected)
    assert torch.equal(gptq_v2.decode(bits, tensors).dequantize(), expected)


def test_gptq_v2_three_bits_split_where_the_description_says():
    weight = random_affine(AffineLayout(32, 32, 3), seed=3)
    words = gptq_v2.encode(weight)["qweight"][:, 5].to(torch.int64) & 0xFFFFFFFF
    code = weight.codes[5].to(torch.int64)
    assert int(words[0] & 7) == int(code[0])
    assert int(words[0] >> 30) == int(code[10] & 3) and int(words[1] & 1) == int(code[10] >> 2)
    assert int(words[1] >> 31) == int(code[21] & 1) and int(words[2] & 3) == int(code[21] >> 1)
    assert int(words[2] >> 29) == int(code[31])


def test_gptq_v2_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="has bits 2, 3, 4, 8"):
        gptq_v2.encode(random_affine(AffineLayout(32, 32, 5)))
    with pytest.raises(ValueError, match="multiples of 32"):
        gptq_v2.encode(random_affine(AffineLayout(32, 40, 4)))
    large = random_affine(AffineLayout(32, 32, 4, scale_dtype=torch.bfloat16))
    large.scales[0, 0] = 1e30
    with pytest.raises(ValueError, match="float16"):
        gptq_v2.encode(large)
    tensors = gptq_v2.encode(random_affine(AffineLayout(32, 64, 4, 32)))
    with pytest.raises(ValueError, match="belong together"):
        gptq_v2.decode(4, {**tensors, "qzeros": tensors["qzeros"][:1]})
    with pytest.raises(ValueError, match="g_idx"):
        gptq_v2.decode(4, {**tensors, "g_idx": tensors["g_idx"] * 0})


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("kind", ["pack_quantized", "int_quantized"])
def test_compressed_tensors_own_library_reads_them(bits, symmetric, group_size, kind):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    assert library
    if bits == 1 and symmetric:
        pytest.skip("one bit around a middle has no positive value")
    weight = random_affine(AffineLayout(48, 96, bits, group_size, symmetric))
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="channel" if group_size < 0 else "group",
        group_size=None if group_size < 0 else group_size,
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = getattr(compressed_tensors, kind)(weight, torch.float32)
    compressor = BaseCompressor.get_value_from_registry(kind.replace("_", "-"))
    assert torch.equal(compressor.decompress(tensors, scheme)["weight"], weight.dequantize())


def test_compressed_tensors_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="without act_order"):
        compressed_tensors.pack_quantized(random_affine(AffineLayout(16, 64, 4, 32), perm=True))
    with pytest.raises(ValueError, match="whole groups"):
        compressed_tensors.int_quantized(random_affine(AffineLayout(16, 72, 4, 32)))
    weight = random_affine(AffineLayout(16, 64, 4), perm=True)
    tensors = compressed_tensors.int_quantized(weight)
    back = (tensors["weight"] - tensors["weight_zero_point"].float()) * tensors["weight_scale"]
    assert torch.equal(back, weight.dequantize())
