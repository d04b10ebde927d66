// The weights that have outliers, in fp32. Internal linkage (see vec.h).
#pragma once
#include "cpu/panels.h"
#include "cpu/statistics_avx512.h"
#include "cpu/three_bits.h"
#include "cpu/vec.h"

namespace hf_spqr {
namespace {

// Code of one weight, of at most 4 bits.
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

// Calls use(row, column of the panel, weight) for those of the panel's first `tiles` tiles, from next[row] on, which
// are the places in the list of outliers of the row block's rows.
template <int B, class Use>
inline void for_each_outlier(const Matrix& m, const Panel& panel, int64_t tiles, const PanelScales& statistics,
                             int64_t block, int rows, int32_t* next, const Use& use) {
    const int64_t first = panel.first_tile * kColumns;
    const uint64_t width = tiles * kColumns;
    for (int r = 0; r < rows; ++r) {
        const int32_t end = m.outlier_row[block * kRows + r + 1];
        for (; next[r] < end; ++next[r]) {
            const int32_t i = next[r];
            const uint64_t entry = m.outlier ? m.outlier[i] : m.outlier_wide[i];
            const uint64_t column = (m.outlier ? entry & 0xffff : entry & 0xffffffff) - first;
            if (column >= width) break;
            const int group = m.group == kPerChannel ? 0 : int(column / m.group);
            const int q = code_at(panel.tiles + column / kColumns * B * kRows, B, r, int(column % kColumns));
            const float s = statistics.scale[group * kRows + r], z = statistics.zero[group * kRows + r];
            const float value = from_f16(uint16_t(m.outlier ? entry >> 16 : entry >> 32));
            use(r, int64_t(column), (float(q) - z) * s + value);
        }
    }
}

}  // namespace
}  // namespace hf_spqr
