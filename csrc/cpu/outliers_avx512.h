// The outliers of a row block against one token. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include <string.h>
#include "cpu/panels.h"
#include "cpu/prefetch.h"

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

// The activations of entries, one after another.
inline void fetch_activations(const uint32_t* entry, int64_t count, const float* x, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = x[entry[i] & 0xffff];
}

// Sum of value * x over `count` entries.
inline float multiply_values(const uint32_t* entry, const float* x, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = count - i < 16 ? __mmask16((1u << (count - i)) - 1) : __mmask16(0xffff);
        const __m512i e = _mm512_maskz_loadu_epi32(mask, entry + i);
        const __m512 value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(e, 16)));
        sum = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, x + i), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// The outliers of a pass over R row blocks against one token. Their activations are fetched a few with each tile,
// while the vector units work on the dense weights and the memory brings them; the products are taken in the end, and
// the entries of the next pass prefetched then, so that the memory has something to do meanwhile.
// Scalar loads and stores fetch: they beat a gather instruction on several processors.
template <int R>
struct OutlierPass {
    static constexpr int64_t kMost = 16384;  // entries; more are multiplied where they lie
    const Matrix& m;
    const float* x;
    int64_t first_row, rows, begin = 0, count = 0, per_tile = 0;
    int64_t fetched = 0, last = 0;  // last: from where a tile may still begin
    alignas(64) float waiting[kMost];

    OutlierPass(const Matrix& matrix, int64_t block, const float* activations)
        : m(matrix), x(activations), first_row(block * kRows) {
        if (m.outlier_row == nullptr) return;
        rows = m.rows - first_row < R * kRows ? m.rows - first_row : R * kRows;
        begin = m.outlier_row[first_row];
        count = m.outlier_row[first_row + rows] - begin;
        if (m.outlier == nullptr || count == 0) return;
        per_tile = (ceil_div(count, ceil_div(m.columns, kColumns)) + 3) / 4 * 4;
        // A tile may fetch entries of later passes, but none after the matrix's last one.
        last = m.outlier_row[m.rows] - begin - per_tile;
        if (last > count - 1) last = count - 1;
        if (count + per_tile > kMost) last = -1;
    }

    __attribute__((always_inline)) void tile() {
        const int64_t from = fetched;
        if (from > last || per_tile == 0) return;
        fetched = from + per_tile;
        switch (per_tile) {  // shares up to 1 % of two row blocks: no loop
            case 4:
                return fetch<4>(from);
            case 8:
                return fetch<8>(from);
            case 12:
                return fetch<12>(from);
            default:
                for (int64_t i = 0; i < per_tile; i += 4) fetch<4>(from + i);
        }
    }

    // Adds what the rows of each block give.
    void add(__m512* y) {
        if (count == 0) return;
        alignas(64) float sum[R * kRows] = {};
        if (m.outlier == nullptr || count + per_tile > kMost) {
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t b = m.outlier_row[first_row + r], e = m.outlier_row[first_row + r + 1];
                sum[r] = m.outlier ? outlier_sum(m.outlier, b, e, x) : outlier_sum(m.outlier_wide, b, e, x);
            }
        } else {
            const uint32_t* entry = m.outlier + begin;
            if (fetched < count) fetch_activations(entry + fetched, count - fetched, x, waiting + fetched);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t b = m.outlier_row[first_row + r] - begin;
                const int64_t n = m.outlier_row[first_row + r + 1] - begin - b;
                sum[r] = multiply_values(entry + b, waiting + b, n);
                prefetch_lines(entry + count + b, ceil_div(n, 16));
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) y[r] = _mm512_add_ps(y[r], _mm512_load_ps(sum + r * kRows));
    }

  private:
    template <int Count>
    __attribute__((always_inline)) void fetch(int64_t from) {
        const uint32_t* entry = m.outlier + begin + from;
        const uint32_t* bits = reinterpret_cast<const uint32_t*>(x);
        uint32_t* to = reinterpret_cast<uint32_t*>(waiting + from);
#pragma GCC unroll 6
        for (int i = 0; i < Count; i += 2) {  // one load for two columns: loads are what these loops are short of
            uint64_t two;
            memcpy(&two, entry + i, sizeof two);
            uint64_t c = uint16_t(two), d = uint16_t(two >> 32);
            asm("" : "+r"(c), "+r"(d));  // keeps the compiler from making a gather of it
            to[i] = bits[c];
            to[i + 1] = bits[d];
        }
    }
};

}  // namespace
}  // namespace hf_spqr
