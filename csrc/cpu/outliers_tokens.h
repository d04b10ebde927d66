// The outliers of a row block against several tokens in fp32. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/panels.h"
#include "cpu/transpose.h"

namespace hf_spqr {
namespace {

// sums[vector][token]: entries [begin, end) of value * x[column] for V vectors of 16 tokens.
template <int V>
inline void outlier_sums(const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t padded, __m512* sums) {
    constexpr int kChains = 4 / V;  // so that no sum waits for itself
    __m512 sum[V][kChains];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) sum[v][c] = _mm512_setzero_ps();
    }
    const auto add = [&](int64_t i, int chain) __attribute__((always_inline)) {
        const uint64_t column = m.outlier ? m.outlier[i] & 0xffff : m.outlier_wide[i] & 0xffffffff;
        const uint16_t value = m.outlier ? uint16_t(m.outlier[i] >> 16) : uint16_t(m.outlier_wide[i] >> 32);
        const __m512 w = _mm512_set1_ps(_cvtsh_ss(value));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            sum[v][chain] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + column * padded + v * kRows), sum[v][chain]);
        }
    };
    for (; begin + kChains <= end; begin += kChains) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) add(begin + c, c);
    }
    for (; begin < end; ++begin) add(begin, 0);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        for (int c = 1; c < kChains; ++c) sum[v][0] = _mm512_add_ps(sum[v][0], sum[v][c]);
        sums[v] = sum[v][0];
    }
}

template <int V>
inline void add_outliers(const Matrix& m, int64_t first, int64_t rows, const float* x, int64_t padded, int64_t tokens,
                         float* y, int64_t stride) {
    alignas(64) float sums[V][kRows][kRows] = {};  // [row][token]
    for (int64_t r = 0; r < rows; ++r) {
        __m512 of_row[V];
        outlier_sums<V>(m, m.outlier_row[first + r], m.outlier_row[first + r + 1], x, padded, of_row);
        for (int v = 0; v < V; ++v) _mm512_store_ps(sums[v][r], of_row[v]);
    }
    for (int v = 0; v < V; ++v) {
        alignas(64) float of_token[kRows][kRows];
        transpose(reinterpret_cast<uint32_t*>(sums[v][0]), reinterpret_cast<char*>(of_token), sizeof of_token[0]);
        for (int64_t i = 0, t = v * kRows; i < kRows && t < tokens; ++i, ++t) {
            float* at = y + t * stride;
            _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), _mm512_load_ps(of_token[i])));
        }
    }
}

// Adds to y[token * stride + row]. x is [column][token], `padded` (a multiple of 16) tokens wide.
inline void add_outliers(const Matrix& m, int64_t block, const float* x, int64_t padded, int64_t tokens, float* y,
                         int64_t stride) {
    if (m.outlier_row == nullptr) return;
    const int64_t first = block * kRows, rows = m.rows - first < kRows ? m.rows - first : kRows;
    if (m.outlier_row[first] == m.outlier_row[first + rows]) return;
    for (int64_t t = 0; t < tokens;) {
        const int64_t left = padded - t;
        if (left >= 4 * kRows) {
            add_outliers<4>(m, first, rows, x + t, padded, tokens - t, y + t * stride, stride);
            t += 4 * kRows;
        } else if (left >= 2 * kRows) {
            add_outliers<2>(m, first, rows, x + t, padded, tokens - t, y + t * stride, stride);
            t += 2 * kRows;
        } else {
            add_outliers<1>(m, first, rows, x + t, padded, tokens - t, y + t * stride, stride);
            t += kRows;
        }
    }
}

}  // namespace
}  // namespace hf_spqr
