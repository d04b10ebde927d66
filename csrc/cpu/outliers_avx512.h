// The outliers of a row block against a few tokens. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include <string.h>
#include "cpu/planes.h"
#include "cpu/prefetch.h"

namespace hf_spqr {
namespace {

// Four bytes for each of S tokens.
template <int S>
struct Slots {
    uint32_t token[S];
};

// x of entries, one after another.
template <int S>
inline void fetch_activations(const uint32_t* entry, int64_t count, const Slots<S>* x, Slots<S>* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = x[entry[i] & 0xffff];
}

// Sixteen values from `entry` on, of which those in the mask exist, else zeros.
inline __m512 load_values(const uint32_t* entry, __mmask16 mask) {
    const __m512i e = _mm512_maskz_loadu_epi32(mask, entry);
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(e, 16)));
}

// sum[token * stride] += value * x over `count` entries.
inline void multiply_values(const uint32_t* entry, const Slots<1>* x, int64_t count, float* sum, int64_t) {
    __m512 part = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = count - i < 16 ? __mmask16((1u << (count - i)) - 1) : __mmask16(0xffff);
        part = _mm512_fmadd_ps(load_values(entry + i, mask), _mm512_maskz_loadu_ps(mask, x + i), part);
    }
    *sum += _mm512_reduce_add_ps(part);
}

template <int S>
inline void multiply_values(const uint32_t* entry, const Slots<S>* x, int64_t count, float* sum, int64_t stride) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 part[S];  // lane by lane a token
    for (int s = 0; s < S; ++s) part[s] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        const int64_t left = count - i < 16 ? count - i : 16;
        const uint64_t there = left * S == 64 ? ~uint64_t(0) : (uint64_t(1) << left * S) - 1;
        const __m512 value = load_values(entry + i, __mmask16((1u << left) - 1));
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            const __m512i of = _mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * s)), S / 2);
            const float* from = reinterpret_cast<const float*>(x + i) + 16 * s;
            part[s] = _mm512_fmadd_ps(_mm512_permutexvar_ps(of, value),
                                      _mm512_maskz_loadu_ps(__mmask16(there >> 16 * s), from), part[s]);
        }
    }
    for (int s = 1; s < S; ++s) part[0] = _mm512_add_ps(part[0], part[s]);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(part[0]), _mm512_extractf32x8_ps(part[0], 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    if constexpr (S == 2) quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    alignas(16) float of_token[4];
    _mm_store_ps(of_token, quarter);
    for (int s = 0; s < S; ++s) sum[s * stride] += of_token[s];
}

// The outliers of a pass over R row blocks against T tokens, x being S slots for each column. They are fetched a few
// with each tile, while the vector units work on the dense weights and the memory brings them; the products are taken
// in the end, and the entries of the next pass prefetched then, so that the memory has something to do meanwhile.
// Scalar loads and stores fetch: they beat a gather instruction on several processors.
template <int R, int T>
struct OutlierPass {
    static constexpr int S = FewTokens::slots(T);
    static constexpr int64_t kMost = 32768 / S;  // entries; more are multiplied where they lie
    const Matrix& m;
    const Slots<S>* x;
    int64_t first_row, rows, begin = 0, count = 0, per_tile = 0;
    int64_t fetched = 0, last = 0;  // last: from where a tile may still begin
    alignas(64) Slots<S> waiting[kMost];

    OutlierPass(const Matrix& matrix, int64_t block, const float* activations)
        : m(matrix), x(reinterpret_cast<const Slots<S>*>(activations)), first_row(block * kRows) {
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
    void add(__m512 (*y)[R]) {
        if (count == 0) return;
        alignas(64) float sum[S][R * kRows] = {};
        if (m.outlier && count + per_tile <= kMost) {
            const uint32_t* entry = entries();
            if (fetched < count) fetch_activations(entry + fetched, count - fetched, x, waiting + fetched);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t b = m.outlier_row[first_row + r] - begin;
                const int64_t n = m.outlier_row[first_row + r + 1] - begin - b;
                multiply_values(entry + b, waiting + b, n, sum[0] + r, R * kRows);
                prefetch_lines(entry + count + b, ceil_div(n, 16));
            }
        } else {
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t b = m.outlier_row[first_row + r] - begin;
                const int64_t n = m.outlier_row[first_row + r + 1] - begin - b;
                if (m.outlier)
                    add_at_once(b, n, sum[0] + r);
                else
                    add_wide(b, n, sum[0] + r);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) y[t][r] = _mm512_add_ps(y[t][r], _mm512_load_ps(sum[t] + r * kRows));
        }
    }

  private:
    const uint32_t* entries() const { return m.outlier + begin; }

    template <int Count>
    __attribute__((always_inline)) void fetch(int64_t from) {
        const uint32_t* entry = entries() + from;
        Slots<S>* to = waiting + from;
#pragma GCC unroll 6
        for (int i = 0; i < Count; i += 2) {  // one load for two columns: loads are what these loops are short of
            uint64_t two;
            memcpy(&two, entry + i, sizeof two);
            uint64_t c = uint16_t(two), d = uint16_t(two >> 32);
            asm("" : "+r"(c), "+r"(d));  // keeps the compiler from making a gather of it
            to[i] = x[c];
            to[i + 1] = x[d];
        }
    }

    // Entries of a row, fetched and multiplied in turn.
    void add_at_once(int64_t first, int64_t n, float* sum) {
        for (int64_t done = 0; done < n; done += kMost) {
            const int64_t here = n - done < kMost ? n - done : kMost;
            fetch_activations(entries() + first + done, here, x, waiting);
            multiply_values(entries() + first + done, waiting, here, sum, R * kRows);
        }
    }

    void add_wide(int64_t first, int64_t n, float* sum) const {
        for (const uint64_t *entry = m.outlier_wide + begin + first, *end = entry + n; entry < end; ++entry) {
            const float* of_column = reinterpret_cast<const float*>(x + (*entry & 0xffffffff));
            for (int s = 0; s < S; ++s) sum[s * R * kRows] += _cvtsh_ss(uint16_t(*entry >> 32)) * of_column[s];
        }
    }
};

}  // namespace
}  // namespace hf_spqr
