// The outliers of a row block against several bf16 tokens. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/halves.h"
#include "cpu/transpose.h"

namespace hf_spqr {
namespace {

// Sixteen entries from `i` on, `count` of which exist: their columns, and their values in fp32, else zeros.
inline void load_outliers(const Matrix& m, int64_t i, int count, __m512i* column, __m512* value) {
    const __mmask16 some = __mmask16((1u << count) - 1);
    __m512i high;
    if (m.outlier) {
        const __m512i entry = _mm512_maskz_loadu_epi32(some, m.outlier + i);
        *column = _mm512_and_si512(entry, _mm512_set1_epi32(0xffff));
        high = _mm512_srli_epi32(entry, 16);
    } else {
        const __m512i a = _mm512_maskz_loadu_epi64(__mmask8(some), m.outlier_wide + i);
        const __m512i b = _mm512_maskz_loadu_epi64(__mmask8(some >> 8), m.outlier_wide + i + 8);
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        *column = _mm512_permutex2var_epi32(a, even, b);
        high = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
    }
    *value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(high));
}

// Outliers of a row, padded to a multiple of 16 rather than counted out, because rows differ and the branch would be
// mispredicted.
struct RowOutliers {
    static constexpr int kMost = 256;
    int row, count = 0;
    alignas(64) float value[kMost];
    alignas(64) uint32_t place[kMost];  // of the column's tokens
};

// Goes through the outliers of a row block.
struct OutlierWalk {
    const Matrix& m;
    const int64_t first, rows;
    const __m512i zeros, stride;
    int row = 0;
    int32_t next;

    OutlierWalk(const Matrix& matrix, int64_t first_row, int64_t row_count, const Halves& x)
        : m(matrix),
          first(first_row),
          rows(row_count),
          zeros(_mm512_set1_epi32(int(x.zero_column()))),
          stride(_mm512_set1_epi32(int(x.padded_tokens))),
          next(matrix.outlier_row[first_row]) {}

    bool get(RowOutliers& out) {
        while (row < rows && next == m.outlier_row[first + row + 1]) ++row;
        if (row == rows) return false;
        const int32_t left = m.outlier_row[first + row + 1] - next;
        const int count = left < RowOutliers::kMost ? left : RowOutliers::kMost;
        out.row = row;
        out.count = count;
        for (int i = 0; i < count; i += 16) {
            const int here = count - i < 16 ? count - i : 16;
            __m512i column;
            __m512 value;
            load_outliers(m, next + i, here, &column, &value);
            column = _mm512_mask_mov_epi32(column, __mmask16(0xffffu << here), zeros);
            _mm512_store_si512(out.place + i, _mm512_mullo_epi32(column, stride));
            _mm512_store_ps(out.value + i, value);
        }
        next += count;
        return true;
    }
};

// sums[vector][row][token] += value * x[column], for V vectors of 16 tokens.
template <int V>
inline void multiply_outliers(const RowOutliers& row, const uint16_t* x, float (*sums)[kRows][kRows]) {
    constexpr int kChains = V == 4 ? 2 : 4;  // so that no sum waits for itself
    __m512 sum[V][kChains];
    for (int v = 0; v < V; ++v) {
        for (int c = 0; c < kChains; ++c) sum[v][c] = _mm512_setzero_ps();
    }
    for (int i = 0; i < row.count; i += 16) {
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
            const __m512 w = _mm512_set1_ps(row.value[i + j]);
            const __m256i* at = reinterpret_cast<const __m256i*>(x + row.place[i + j]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at + v)), 16);
                sum[v][j % kChains] = _mm512_fmadd_ps(w, _mm512_castsi512_ps(wide), sum[v][j % kChains]);
            }
        }
    }
    for (int v = 0; v < V; ++v) {
        for (int c = 1; c < kChains; ++c) sum[v][0] = _mm512_add_ps(sum[v][0], sum[v][c]);
        float* const at = sums[v][row.row];
        _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), sum[v][0]));
    }
}

template <int V>
inline void add_outliers(const Matrix& m, int64_t first, int64_t rows, const Halves& x, int64_t token, float* y,
                         int64_t stride) {
    alignas(64) float sums[V][kRows][kRows] = {};
    // A row is widened while the one before is multiplied, since what was just stored cannot be loaded in parts at
    // once.
    RowOutliers row[2];
    OutlierWalk walk(m, first, rows, x);
    bool more = walk.get(row[0]);
    for (int i = 0; more; i ^= 1) {
        more = walk.get(row[i ^ 1]);
        multiply_outliers<V>(row[i], x.column(0) + token, sums);
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
