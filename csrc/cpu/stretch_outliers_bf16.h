// Outliers that are added to the rounded weights of a stretch of tiles (see tables_bf16.h). Internal linkage (see
// vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/outliers_bf16.h"
#include "cpu/tables_bf16.h"

namespace hf_spqr {
namespace {

// Of a row block, one stretch after the other.
struct StretchOutliers {
    int32_t next[kRows], end[kRows];
    int rows;

    void start(const Matrix& m, int64_t row_block) {
        const int64_t row = row_block * kRows;
        rows = m.rows - row < kRows ? int(m.rows - row) : kRows;
        for (int r = 0; r < rows; ++r) {
            next[r] = m.outlier_row[row + r];
            end[r] = m.outlier_row[row + r + 1];
        }
    }
};

// Their places among weights whose quads are V vectors apart.
template <int V>
struct FoundOutliers {
    int count = 0;
    uint32_t place[kRows * kTiles * kColumns + 16];  // in half-words
    float value[kRows * kTiles * kColumns + 16];

    // Those in columns [first, first + width), without a branch on how many a row has of them.
    void find(const Matrix& m, StretchOutliers& of, int64_t first, int64_t width) {
        const __m512i begin = _mm512_set1_epi32(int(first)), columns = _mm512_set1_epi32(int(width));
        const __m512i in_quad = _mm512_set1_epi32(3);
        count = 0;
        for (int r = 0; r < of.rows; ++r) {
            const __m512i of_row = _mm512_set1_epi32(2 * (quad_side(r) * kRows + quad_word(r, 0)));
            int here;
            do {
                const int left = of.end[r] - of.next[r] < 16 ? of.end[r] - of.next[r] : 16;
                __m512i column;
                __m512 values;
                load_outliers(m, of.next[r], left, &column, &values);
                column = _mm512_sub_epi32(column, begin);
                const __mmask16 within = _mm512_cmplt_epu32_mask(column, columns);
                here = __builtin_popcount(within & ((1 << left) - 1));
                const __m512i quad = _mm512_slli_epi32(_mm512_srli_epi32(column, 2), V == 2 ? 6 : 7);
                const __m512i places =
                    _mm512_add_epi32(_mm512_or_si512(quad, _mm512_and_si512(column, in_quad)), of_row);
                _mm512_storeu_si512(place + count, places);
                _mm512_storeu_ps(value + count, values);
                count += here;
                of.next[r] += here;
            } while (here == 16);
        }
    }

    // A sum is rounded once more, after its dense weight: both times as the other weights of its group are.
    void add_to(uint32_t* weights) const {
        static_assert(V == 2 || V == 4);
        uint16_t* const out = reinterpret_cast<uint16_t*>(weights);
        for (int i = 0; i < count; ++i) {
            uint16_t& weight = out[place[i]];
            const __m128 dense = _mm_castsi128_ps(_mm_cvtsi32_si128(int(uint32_t(weight) << 16)));
            const __m128bh sum = _mm_cvtneps_pbh(_mm_add_ss(dense, _mm_set_ss(value[i])));
            weight = uint16_t(_mm_cvtsi128_si32((__m128i)sum));
        }
    }
};

}  // namespace
}  // namespace hf_spqr
