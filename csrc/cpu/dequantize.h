// Dense rows out of a packed matrix. Internal linkage (see vec.h).
#pragma once
#include <type_traits>
#include "cpu/round.h"
#include "cpu/row_block.h"
#include "cpu/transpose.h"

namespace hf_spqr {
namespace {

// w[column][row] in fp32 to words[half][16][row]: row r of the tile is words[0][0..15][r], then words[1][0..15][r] in
// fp32; words[0] alone, two columns to a word, in 16 bits.
template <DType D>
inline void to_words(const float* w, uint32_t (*words)[kRows][kRows]) {
    if constexpr (D == DType::f32) {
        memcpy(words, w, kColumns * kRows * 4);
    } else {
        for (int pair = 0; pair < kColumns / 2; ++pair) {
            for (int lane = 0; lane < kRows; lane += kLanes) {
                const VecF even = load(w + 2 * pair * kRows + lane), odd = load(w + (2 * pair + 1) * kRows + lane);
                const VecU both = D == DType::bf16 ? bf16_pairs(even, odd) : f16_pairs(even, odd);
                memcpy(&words[0][pair][lane], &both, sizeof both);
            }
        }
    }
}

template <DType D>
void dequantize_as(const DequantizeArgs& a, int64_t first_block, int64_t last_block) {
    using Element = std::conditional_t<D == DType::f32, uint32_t, uint16_t>;
    constexpr int kHalves = D == DType::f32 ? 2 : 1;
    const Matrix& m = a.weight;
    for (int64_t block = first_block; block < last_block; ++block) {
        Element* const out = static_cast<Element*>(a.out) + (block - first_block) * kRows * a.out_stride;
        const int rows = m.rows - block * kRows < kRows ? int(m.rows - block * kRows) : kRows;
        OutlierCursors outliers(m, block);
        for_each_tile(m, block, [&](int64_t first, float* w) {
            outliers.add(first, w);
            alignas(64) uint32_t words[kHalves][kRows][kRows];
            to_words<D>(w, words);
            const int columns = m.columns - first < kColumns ? int(m.columns - first) : kColumns;
            if (rows == kRows && columns == kColumns && !a.perm) {
                for (int half = 0; half < kHalves; ++half) {
                    transpose(words[half][0], reinterpret_cast<char*>(out + first) + half * 64,
                              a.out_stride * sizeof(Element));
                }
                return;
            }
            alignas(64) Element tile[kRows][kColumns];
            for (int half = 0; half < kHalves; ++half) {
                transpose(words[half][0], reinterpret_cast<char*>(tile) + half * 64, sizeof tile[0]);
            }
            for (int r = 0; r < rows; ++r) {
                Element* row = out + r * a.out_stride;
                if (a.perm) {
                    for (int c = 0; c < columns; ++c) row[a.perm[first + c]] = tile[r][c];
                } else {
                    memcpy(row + first, tile[r], columns * sizeof(Element));
                }
            }
        });
    }
}

void dequantize_generic(const DequantizeArgs& a, int64_t first_block, int64_t last_block) {
    switch (a.dtype) {
        case DType::f32:
            return dequantize_as<DType::f32>(a, first_block, last_block);
        case DType::bf16:
            return dequantize_as<DType::bf16>(a, first_block, last_block);
        default:
            return dequantize_as<DType::f16>(a, first_block, last_block);
    }
}

}  // namespace
}  // namespace hf_spqr
