// The outliers of a row block against one token. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/panels.h"

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

// The activations of entries [begin, end), one after another. Scalar loads and stores beat a gather instruction on
// several processors, and leave the vector units to the dense part.
inline void fetch_activations(const uint32_t* entry, int64_t count, const float* x, float* out) {
    const uint16_t* column = reinterpret_cast<const uint16_t*>(entry);  // the low half of each entry
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(x);
    uint32_t* to = reinterpret_cast<uint32_t*>(out);
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) {
        uint32_t c = column[2 * i];
        asm("" : "+r"(c));  // keeps the compiler from making a gather of it
        to[i] = bits[c];
    }
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

// The outliers of a pass over a few row blocks against one token, a share of the rows with each panel: the memory goes
// on bringing dense weights meanwhile. What one panel fetches the next one multiplies, when the stores are through.
// The entries of the next pass are fetched ahead.
struct OutlierSums {
    static constexpr int64_t kAtOnce = 1024;  // entries
    const Matrix& m;
    const float* x;
    int64_t row, end, first, rows_per_panel = 0;
    int64_t fetched = 0;  // rows before `row` whose activations wait in `waiting`
    const char* ahead = nullptr;
    int64_t lines_left = 0, lines_per_panel = 0;
    alignas(64) float sum[4 * kRows] = {};
    alignas(64) float waiting[kAtOnce];

    OutlierSums(const Matrix& matrix, int64_t block, int blocks, const float* activations)
        : m(matrix), x(activations), row(block * kRows), end((block + blocks) * kRows), first(row) {
        if (m.outlier_row == nullptr) return;
        const int64_t panels = ceil_div(m.columns, m.group == kPerChannel ? m.columns : 16 * m.group);
        end = end < m.rows ? end : m.rows;
        rows_per_panel = ceil_div(end - row, panels);
        const int64_t next = 2 * end - row < m.rows ? 2 * end - row : m.rows, size = m.outlier ? 4 : 8;
        const char* entries =
            m.outlier ? reinterpret_cast<const char*>(m.outlier) : reinterpret_cast<const char*>(m.outlier_wide);
        ahead = entries + m.outlier_row[end] * size;
        lines_left = ceil_div((m.outlier_row[next] - m.outlier_row[end]) * size, 64);
        lines_per_panel = ceil_div(lines_left, panels);
    }
    void multiply() {
        const float* at = waiting;
        for (int64_t r = row - fetched; r < row; ++r) {
            const int64_t begin = m.outlier_row[r], count = m.outlier_row[r + 1] - begin;
            sum[r - first] = multiply_values(m.outlier + begin, at, count);
            at += count;
        }
        fetched = 0;
    }
    void rows(int64_t count) {
        multiply();
        count = count < end - row ? count : end - row;
        if (count <= 0) return;
        const int64_t begin = m.outlier_row[row], entries = m.outlier_row[row + count] - begin;
        if (m.outlier && entries <= kAtOnce) {
            fetch_activations(m.outlier + begin, entries, x, waiting);
            fetched = count;
            row += count;
            return;
        }
        for (; count > 0; --count, ++row) {
            const int64_t b = m.outlier_row[row], e = m.outlier_row[row + 1];
            sum[row - first] = m.outlier ? outlier_sum(m.outlier, b, e, x) : outlier_sum(m.outlier_wide, b, e, x);
        }
    }
    void panel() {
        if (m.outlier_row == nullptr) return;
        for (int64_t i = 0; i < lines_per_panel && lines_left > 0; ++i, --lines_left, ahead += 64) {
            _mm_prefetch(ahead, _MM_HINT_T1);
        }
        rows(rows_per_panel);
    }
    void rest() {
        if (m.outlier_row == nullptr) return;
        rows(end - row);
        multiply();
    }
    __m512 of(int r) const { return _mm512_load_ps(sum + r * kRows); }
};

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
