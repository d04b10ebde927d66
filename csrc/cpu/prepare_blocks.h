// Fills TokenBlocks. Internal linkage (see vec.h).
#pragma once
#include "cpu/kernels.h"
#include "cpu/quantize.h"
#include "cpu/token_blocks.h"
#include "cpu/transpose.h"

namespace hf_spqr {
namespace {

// Scale of `columns` values, at most 128; NaN where one is NaN or infinite, 0 where all are next to nothing.
template <int Bytes>
float block_scale(const float* x, int columns) {
    __m512 largest = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
    for (int k = 0; k < columns; k += kLanes) {
        const __m512 v = _mm512_maskz_loadu_ps(columns < kLanes ? 0xff : 0xffff, x + k);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
        bad = _mm512_add_ps(bad, _mm512_sub_ps(v, v));  // zero but for NaN and infinity
    }
    const float top = _mm512_reduce_max_ps(largest);
    return (top <= 1e-30f ? 0.f : top / (Bytes == 1 ? 127.f : 32512.f)) + _mm512_reduce_add_ps(bad);
}

// Codes of the `columns` values of a group; returns their sum.
template <int Bytes>
float block_codes(const float* x, int columns, float scale, int8_t* out) {
    __m512i sum = _mm512_setzero_si512();
    const __mmask16 lanes = columns < kLanes ? 0xff : 0xffff, some = scale > 0.f ? lanes : 0;
    for (int k = 0; k < columns; k += kLanes) {
        const __m512 v = _mm512_maskz_loadu_ps(lanes, x + k);
        const __m512i code = _mm512_cvtps_epi32(_mm512_maskz_div_ps(some, v, _mm512_set1_ps(scale)));
        sum = _mm512_add_epi32(sum, code);
        if constexpr (Bytes == 1) {
            _mm512_mask_cvtepi32_storeu_epi8(out + k, lanes, code);
        } else {
            const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(code, 24), 24);
            const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(code, low), 8);
            _mm512_mask_cvtepi32_storeu_epi8(out + k, lanes, high);
            _mm512_mask_cvtepi32_storeu_epi8(out + kBlockColumns + k, lanes, low);
        }
    }
    return float(_mm512_reduce_add_epi32(sum));
}

// One block of a token, whose values are left in x: of one byte, what their codes stand for.
template <int Bytes, DType D>
void prepare_block(const PrepareArgs& a, const TokenBlocks<Bytes>& out, int64_t block, int64_t token, float* x) {
    const char* from = static_cast<const char*>(a.x) + token * a.x_stride * (D == DType::f32 ? 4 : 2);
    for (int k = 0; k < kBlockColumns; k += kLanes) {
        store(x + k, load_x<D>(from, a.perm, block * kBlockColumns + k, a.columns));
    }
    const int width = kBlockColumns / int(out.groups), scaled = kBlockColumns / int(out.scales);
    int8_t* code = out.code(block, token);
    float scale = 0.f;
    for (int k = 0; k < kBlockColumns; k += width) {
        if (k % scaled == 0) out.scale(block, k / scaled)[token] = scale = block_scale<Bytes>(x + k, scaled);
        out.sum(block, k / width)[token] = block_codes<Bytes>(x + k, width, scale, code + k);
    }
    if (Bytes == 1 && out.padded_tokens) {
        for (int k = 0; k < kBlockColumns; ++k) x[k] = float(code[k]) * scale;
    }
}

// Sixteen tokens from `first` on, or as many as there are. What lies beside tokens in a column is zero.
template <int Bytes, DType D>
void prepare_tokens(const PrepareArgs& a, const TokenBlocks<Bytes>& out, int64_t first) {
    const int64_t last = out.tokens - first < kRows ? out.tokens : first + kRows;
    alignas(64) float x[kRows][kBlockColumns] = {};
    for (int64_t block = 0; block < out.blocks; ++block) {
        for (int64_t t = first; t < last; ++t) prepare_block<Bytes, D>(a, out, block, t, x[t - first]);
        if (!out.padded_tokens) continue;
        for (int column = 0; column < kBlockColumns; column += kRows) {
            alignas(64) uint32_t part[kRows][kRows];
            for (int t = 0; t < kRows; ++t) memcpy(part[t], x[t] + column, sizeof part[t]);
            char* to = reinterpret_cast<char*>(out.column(block * kBlockColumns + column) + first);
            transpose(part[0], to, out.padded_tokens * 4);
        }
    }
}

// Tokens [first, last).
template <int Bytes>
void prepare_blocks(const PrepareArgs& a, int64_t first, int64_t last) {
    const TokenBlocks<Bytes> out(*a.weight, a.tokens, a.planes);
    const auto prepare = a.dtype == DType::f32    ? prepare_tokens<Bytes, DType::f32>
                         : a.dtype == DType::bf16 ? prepare_tokens<Bytes, DType::bf16>
                                                  : prepare_tokens<Bytes, DType::f16>;
    for (int64_t token = first; token < last; token += kRows) prepare(a, out, token);
}

}  // namespace
}  // namespace hf_spqr
