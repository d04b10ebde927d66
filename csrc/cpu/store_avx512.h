// Writes the results of a row block. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/matrix.h"

namespace hf_spqr {
namespace {

inline __m256i to_bf16(__m512 v) {  // to nearest even; NaN stays NaN
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}

inline __m256i to_f16(__m512 v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline __m512 load_rows(const void* p, int64_t first, __mmask16 mask, DType dtype) {
    if (dtype == DType::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + first);
    const __m256i h = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + first);
    if (dtype == DType::f16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// y[token, 16 rows of block] = sum + bias.
inline void store_block(const LinearArgs& a, int64_t token, int64_t block, __m512 sum) {
    const int64_t row = block * kRows, left = a.weight.rows - row;
    const __mmask16 mask = left < kRows ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
    if (a.bias) sum = _mm512_add_ps(sum, load_rows(a.bias, row, mask, a.dtype));
    const int64_t at = token * a.y_stride + row;
    if (a.dtype == DType::f32) {
        _mm512_mask_storeu_ps(static_cast<float*>(a.y) + at, mask, sum);
    } else {
        const __m256i h = a.dtype == DType::bf16 ? to_bf16(sum) : to_f16(sum);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + at, mask, h);
    }
}

}  // namespace
}  // namespace hf_spqr
