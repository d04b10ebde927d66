// The outliers of a row block against one token. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/matrix.h"

namespace hf_spqr {
namespace {

// Sum over entries [begin, end) of value * x[column].
inline float outlier_sum(const uint32_t* entry, int64_t begin, int64_t end, const float* x) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = begin; i < end; i += 16) {
        const __mmask16 mask = end - i < 16 ? __mmask16((1u << (end - i)) - 1) : __mmask16(0xffff);
        const __m512i e = _mm512_maskz_loadu_epi32(mask, entry + i);
        const __m512i column = _mm512_and_si512(e, _mm512_set1_epi32(0xffff));
        const __m512 value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(e, 16)));
        sum = _mm512_fmadd_ps(value, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, column, x, 4), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

inline float outlier_sum(const uint64_t* entry, int64_t begin, int64_t end, const float* x) {
    float sum = 0;
    for (int64_t i = begin; i < end; ++i) {
        sum += _cvtsh_ss(uint16_t(entry[i] >> 32)) * x[entry[i] & 0xffffffff];
    }
    return sum;
}

// Adds the outliers of the block's rows to y.
inline __m512 add_outliers(const Matrix& m, int64_t block, const float* x, __m512 y) {
    if (m.outlier_row == nullptr) return y;
    alignas(64) float sum[kRows] = {};
    for (int64_t row = block * kRows, r = 0; r < kRows && row < m.rows; ++r, ++row) {
        const int64_t begin = m.outlier_row[row], end = m.outlier_row[row + 1];
        if (begin < end) {
            sum[r] = m.outlier ? outlier_sum(m.outlier, begin, end, x) : outlier_sum(m.outlier_wide, begin, end, x);
        }
    }
    return _mm512_add_ps(y, _mm512_load_ps(sum));
}

// The same for several tokens: sum[t] for tokens x + t * stride.
inline void add_outliers(const Matrix& m, int64_t block, const float* x, int64_t stride, int tokens, __m512* sum) {
    if (m.outlier_row == nullptr) return;
    if (tokens == 1) {
        sum[0] = add_outliers(m, block, x, sum[0]);
        return;
    }
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i offset = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(stride)));
    for (int64_t row = block * kRows, r = 0; r < kRows && row < m.rows; ++r, ++row) {
        const int64_t begin = m.outlier_row[row], end = m.outlier_row[row + 1];
        for (int first = 0; first < tokens && begin < end; first += 16) {
            const int here = tokens - first < 16 ? tokens - first : 16;
            const __mmask16 mask = __mmask16((1u << here) - 1);
            __m512 part = _mm512_setzero_ps();
            for (int64_t i = begin; i < end; ++i) {
                const uint64_t column = m.outlier ? m.outlier[i] & 0xffff : m.outlier_wide[i] & 0xffffffff;
                const uint16_t bits = m.outlier ? uint16_t(m.outlier[i] >> 16) : uint16_t(m.outlier_wide[i] >> 32);
                const __m512 v =
                    _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, offset, x + first * stride + column, 4);
                part = _mm512_fmadd_ps(_mm512_set1_ps(_cvtsh_ss(bits)), v, part);
            }
            alignas(64) float value[16];
            _mm512_store_ps(value, part);
            for (int t = 0; t < here; ++t) reinterpret_cast<float*>(sum + first + t)[r] += value[t];
        }
    }
}

}  // namespace
}  // namespace hf_spqr
