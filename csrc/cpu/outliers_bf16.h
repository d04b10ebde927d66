// The outliers of a row block against several bf16 tokens. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/halves.h"
#include "cpu/transpose.h"

namespace hf_spqr {
namespace {

// sums[vector][row][token]: entries [begin, end) of value * x[column] for V vectors of 16 tokens.
template <int V>
inline void outlier_sums(const Matrix& m, int64_t begin, int64_t end, const Halves& x, int64_t token,
                         float (*sums)[kRows][kRows], int64_t row) {
    constexpr int kChains = V == 1 ? 4 : V == 2 ? 2 : 1;  // so that no sum waits for itself
    __m512 sum[V][kChains];
    for (int v = 0; v < V; ++v) {
        for (int c = 0; c < kChains; ++c) sum[v][c] = _mm512_setzero_ps();
    }
    const auto add = [&](int64_t i, int chain) __attribute__((always_inline)) {
        const uint64_t column = m.outlier ? m.outlier[i] & 0xffff : m.outlier_wide[i] & 0xffffffff;
        const uint16_t value = m.outlier ? uint16_t(m.outlier[i] >> 16) : uint16_t(m.outlier_wide[i] >> 32);
        const __m512 w = _mm512_set1_ps(_cvtsh_ss(value));
        const __m256i* tokens = reinterpret_cast<const __m256i*>(x.column(column) + token);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(tokens + v)), 16);
            sum[v][chain] = _mm512_fmadd_ps(w, _mm512_castsi512_ps(wide), sum[v][chain]);
        }
    };
    for (; begin + kChains <= end; begin += kChains) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) add(begin + c, c);
    }
    for (; begin < end; ++begin) add(begin, 0);
    for (int v = 0; v < V; ++v) {
        for (int c = 1; c < kChains; ++c) sum[v][0] = _mm512_add_ps(sum[v][0], sum[v][c]);
        _mm512_store_ps(sums[v][row], sum[v][0]);
    }
}

template <int V>
inline void add_outliers(const Matrix& m, int64_t first, int64_t rows, const Halves& x, int64_t token, float* y,
                         int64_t stride) {
    alignas(64) float sums[V][kRows][kRows] = {};
    for (int64_t r = 0; r < rows; ++r) {
        outlier_sums<V>(m, m.outlier_row[first + r], m.outlier_row[first + r + 1], x, token, sums, r);
    }
    for (int v = 0; v < V; ++v) {
        alignas(64) float of_token[kRows][kRows];
        transpose(reinterpret_cast<uint32_t*>(sums[v][0]), reinterpret_cast<char*>(of_token), sizeof of_token[0]);
        for (int64_t i = 0, t = token + v * kRows; i < kRows && t < x.tokens; ++i, ++t) {
            float* at = y + t * stride;
            _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), _mm512_load_ps(of_token[i])));
        }
    }
}

// Adds to y[token * stride + row].
inline void add_outliers(const Matrix& m, int64_t block, const Halves& x, float* y, int64_t stride) {
    if (m.outlier_row == nullptr) return;
    const int64_t first = block * kRows, rows = m.rows - first < kRows ? m.rows - first : kRows;
    if (m.outlier_row[first] == m.outlier_row[first + rows]) return;
    int64_t token = 0;
    for (; token + 2 * kRows < x.padded_tokens; token += 4 * kRows) {
        add_outliers<4>(m, first, rows, x, token, y, stride);
    }
    if (token + kRows < x.padded_tokens) {
        add_outliers<2>(m, first, rows, x, token, y, stride);
    } else if (token < x.padded_tokens) {
        add_outliers<1>(m, first, rows, x, token, y, stride);
    }
}

}  // namespace
}  // namespace hf_spqr
