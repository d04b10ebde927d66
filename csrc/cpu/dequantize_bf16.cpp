// Dense bf16 rows for a matrix product, with the processor's own rounding. Everything stays in registers from the
// packed words to the finished rows, which is why outliers are put in afterwards.
#include <immintrin.h>
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/statistics_avx512.h"
#include "cpu/three_bits.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace hf_spqr {
namespace {

// The codes of a tile as fp32 vectors of 16 rows. A vpermps looks its low four index bits up in a table that repeats,
// so that the fields above need no masking.
template <int B>
struct Values {
    static constexpr int kPerHalf = 16 / B;
    __m512i vector[4];
    __m512 table;

    Values() {
        alignas(64) float value[16];
        for (int i = 0; i < 16; ++i) value[i] = float(i & ((1 << B) - 1));
        table = _mm512_load_ps(value);
    }
    __attribute__((always_inline)) void load(const uint32_t* tile) {
#pragma GCC unroll 4
        for (int i = 0; i < B; ++i) vector[i] = _mm512_loadu_si512(tile + i * kRows);
        if constexpr (B == 3) {  // pair 15 lies in the spare bits
            const __m512i bit0 = _mm512_set1_epi16(1), bit1 = _mm512_set1_epi16(2);
            const __m512i low = _mm512_ternarylogic_epi64(bit0, _mm512_srli_epi16(vector[0], 15),
                                                          _mm512_srli_epi16(vector[1], 14), 0xca);
            vector[3] =
                _mm512_ternarylogic_epi64(_mm512_or_si512(bit0, bit1), low, _mm512_srli_epi16(vector[2], 13), 0xca);
        }
    }
    template <int Pair, int Parity>
    __attribute__((always_inline)) __m512 get() const {
        constexpr int kVector = B == 3 ? kVector3[Pair] : Pair / kPerHalf;
        constexpr int kShift = (B == 3 ? kShift3[Pair] : B * (Pair % kPerHalf)) + 16 * Parity;
        // An upper half-word that ends with the field has zeros above it; a field of spare bits has them anyway.
        return _mm512_permutexvar_ps(_mm512_srli_epi32(vector[kVector], kShift), table);
    }
};

// Two columns of 16 rows in fp32 as 16 words of two bf16.
inline __m512i pair_of(__m512 even, __m512 odd, __m512i order) {
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

template <int B, int Pair>
__attribute__((always_inline)) inline void pairs_from(const Values<B>& values, const float* scale, const float* zero,
                                                      int group_shift, __m512i order, uint32_t (*words)[kRows]) {
    if constexpr (Pair < 16) {
        const int group = (2 * Pair) >> group_shift;
        const __m512 s = _mm512_load_ps(scale + group * kRows), z = _mm512_load_ps(zero + group * kRows);
        const __m512 even = _mm512_mul_ps(_mm512_sub_ps(values.template get<Pair, 0>(), z), s);
        const __m512 odd = _mm512_mul_ps(_mm512_sub_ps(values.template get<Pair, 1>(), z), s);
        _mm512_store_si512(words[Pair], pair_of(even, odd, order));
        pairs_from<B, Pair + 1>(values, scale, zero, group_shift, order, words);
    }
}

// Code of one weight.
inline int code_at(const uint32_t* tile, int bits, int row, int column) {
    const int pair = column / 2, side = column % 2 * 16;
    if (bits != 3) {
        const int per_half = 16 / bits;
        return tile[pair / per_half * kRows + row] >> (bits * (pair % per_half) + side) & ((1 << bits) - 1);
    }
    if (pair < 15) return tile[kVector3[pair] * kRows + row] >> (kShift3[pair] + side) & 7;
    return (tile[row] >> (15 + side) & 1) | (tile[kRows + row] >> (14 + side) & 2) |
           (tile[2 * kRows + row] >> (13 + side) & 4);
}

// Recomputes in fp32 the weights of a panel that have outliers.
template <int B>
void put_outliers(const Matrix& m, const Panel& panel, const PanelScales& statistics, int64_t block, int rows,
                  int32_t* next, uint16_t* out, int64_t stride) {
    const int64_t first = panel.first_tile * kColumns;
    const uint64_t width = panel.count * kColumns;
    for (int r = 0; r < rows; ++r) {
        const int32_t end = m.outlier_row[block * kRows + r + 1];
        for (; next[r] < end; ++next[r]) {
            const int32_t i = next[r];
            const uint64_t entry = m.outlier ? m.outlier[i] : m.outlier_wide[i];
            const uint64_t column = (m.outlier ? entry & 0xffff : entry & 0xffffffff) - first;  // of the panel
            if (column >= width) break;
            const int group = m.group == kPerChannel ? 0 : int(column / m.group);
            const int q = code_at(panel.tiles + column / kColumns * B * kRows, B, r, int(column % kColumns));
            const float s = statistics.scale[group * kRows + r], z = statistics.zero[group * kRows + r];
            const float value = from_f16(uint16_t(m.outlier ? entry >> 16 : entry >> 32));
            out[r * stride + first + column] = to_bf16((float(q) - z) * s + value);
        }
    }
}

template <int B>
void dequantize_rows(const DequantizeArgs& a, int64_t first_block, int64_t last_block) {
    const Matrix& m = a.weight;
    alignas(64) uint16_t order_words[32];
    for (int r = 0; r < kRows; ++r) {
        order_words[2 * r] = uint16_t(r);
        order_words[2 * r + 1] = uint16_t(16 + r);
    }
    const __m512i order = _mm512_load_si512(order_words);
    const int group_shift = group_shift_in_tile(m);
    PanelScales statistics;
    Values<B> values;
    for (int64_t block = first_block; block < last_block; ++block) {
        uint16_t* const out = static_cast<uint16_t*>(a.out) + (block - first_block) * kRows * a.out_stride;
        const int rows = m.rows - block * kRows < kRows ? int(m.rows - block * kRows) : kRows;
        int32_t next[kRows];
        for (int r = 0; m.outlier_row && r < rows; ++r) next[r] = m.outlier_row[block * kRows + r];
        for (PanelWalk walk(m, block); walk.next();) {
            const Panel& panel = walk.panel;
            statistics.load(m, panel.statistics, panel.groups);
            for (int64_t tile = 0; tile < panel.count; ++tile) {
                alignas(64) uint32_t words[kRows][kRows];
                const int group = group_of_tile(m, tile);
                values.load(panel.tiles + tile * B * kRows);
                pairs_from<B, 0>(values, statistics.scale + group * kRows, statistics.zero + group * kRows,
                                 group_shift, order, words);
                const int64_t first = (panel.first_tile + tile) * kColumns;
                const int columns = m.columns - first < kColumns ? int(m.columns - first) : kColumns;
                if (rows == kRows && columns == kColumns) {
                    transpose(words[0], reinterpret_cast<char*>(out + first), a.out_stride * 2);
                    continue;
                }
                alignas(64) uint16_t part[kRows][kColumns];
                transpose(words[0], reinterpret_cast<char*>(part), sizeof part[0]);
                for (int r = 0; r < rows; ++r) memcpy(out + r * a.out_stride + first, part[r], columns * 2);
            }
            if (m.outlier_row) put_outliers<B>(m, panel, statistics, block, rows, next, out, a.out_stride);
        }
    }
}

void dequantize(const DequantizeArgs& a, int64_t first, int64_t last) {
    if (a.dtype == DType::bf16 && !a.perm) {
        switch (a.weight.bits) {
            case 2:
                return dequantize_rows<2>(a, first, last);
            case 3:
                return dequantize_rows<3>(a, first, last);
            case 4:
                return dequantize_rows<4>(a, first, last);
            default:
                break;
        }
    }
    kAvx512Kernels.dequantize(a, first, last);
}

}  // namespace

const Kernels& bf16_kernels() {
    static const Kernels kernels = {kVnniKernels.planes_bytes, kVnniKernels.prepare, kVnniKernels.linear, dequantize,
                                    kVnniKernels.read,         kVnniKernels.integers};
    return kernels;
}

}  // namespace hf_spqr
