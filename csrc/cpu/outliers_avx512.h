// The outliers of a row block against one token. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/matrix.h"

namespace hf_spqr {
namespace {

// Sum over entries [begin, end) of value * x[column]. Values are widened sixteen at a time; x is fetched one by one,
// which is faster than a gather on several processors and no slower elsewhere. The last sixteen are padded with zeros
// at column 0 rather than counted out, because rows differ and the branch would be mispredicted.
inline float outlier_sum(const uint32_t* entry, int64_t begin, int64_t end, const float* x) {
    alignas(64) float value[16];
    alignas(64) int32_t column[16];
    float sum[4] = {};
    for (int64_t i = begin; i < end; i += 16) {
        const __mmask16 mask = end - i < 16 ? __mmask16((1u << (end - i)) - 1) : __mmask16(0xffff);
        const __m512i e = _mm512_maskz_loadu_epi32(mask, entry + i);
        _mm512_store_si512(column, _mm512_and_si512(e, _mm512_set1_epi32(0xffff)));
        _mm512_store_ps(value, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(e, 16))));
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) sum[j % 4] += value[j] * x[column[j]];
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
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

// The same for several tokens: sum[token]. x is [column][token], `padded` (a multiple of 16) tokens wide.
inline void add_outliers(const Matrix& m, int64_t block, const float* x, int64_t padded, int tokens, __m512* sum) {
    if (m.outlier_row == nullptr) return;
    for (int64_t row = block * kRows, r = 0; r < kRows && row < m.rows; ++r, ++row) {
        const int64_t begin = m.outlier_row[row], end = m.outlier_row[row + 1];
        for (int first = 0; first < tokens && begin < end; first += 16) {
            __m512 part = _mm512_setzero_ps();
            for (int64_t i = begin; i < end; ++i) {
                const uint64_t column = m.outlier ? m.outlier[i] & 0xffff : m.outlier_wide[i] & 0xffffffff;
                const uint16_t value = m.outlier ? uint16_t(m.outlier[i] >> 16) : uint16_t(m.outlier_wide[i] >> 32);
                const __m512 v = _mm512_set1_ps(_cvtsh_ss(value));
                part = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + column * padded + first), part);
            }
            alignas(64) float of_token[16];
            _mm512_store_ps(of_token, part);
            for (int t = first; t < tokens && t < first + 16; ++t) {
                reinterpret_cast<float*>(sum + t)[r] += of_token[t - first];
            }
        }
    }
}

}  // namespace
}  // namespace hf_spqr
