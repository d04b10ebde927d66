// Dequantizes a row block tile by tile, outliers included. Internal linkage (see vec.h).
#pragma once
#include "cpu/tile.h"

namespace hf_spqr {
namespace {

// The outliers of the 16 rows of a row block, taken in column order.
struct OutlierCursors {
    const Matrix& m;
    int rows = 0;
    int64_t next[kRows], end[kRows];

    OutlierCursors(const Matrix& matrix, int64_t row_block) : m(matrix) {
        if (m.outlier_row == nullptr) return;
        const int64_t first = row_block * kRows;
        rows = m.rows - first < kRows ? int(m.rows - first) : kRows;
        for (int r = 0; r < rows; ++r) {
            next[r] = m.outlier_row[first + r];
            end[r] = m.outlier_row[first + r + 1];
        }
    }

    // Adds those below column `first` + 32 to w[column - first][row].
    void add(int64_t first, float* w) {
        for (int r = 0; r < rows; ++r) {
            for (; next[r] < end[r]; ++next[r]) {
                const int64_t i = next[r];
                const uint64_t column =
                    (m.outlier ? m.outlier[i] & 0xffff : m.outlier_wide[i] & 0xffffffff) - uint64_t(first);
                if (column >= kColumns) break;  // of a later tile
                const uint16_t value = m.outlier ? uint16_t(m.outlier[i] >> 16) : uint16_t(m.outlier_wide[i] >> 32);
                w[column * kRows + r] += from_f16(value);
            }
        }
    }
};

// Calls use(first column, words of the tile, scale, shift) for each tile of a row block.
template <class Use>
inline void for_each_packed_tile(const Matrix& m, int64_t row_block, const Use& use) {
    Statistics statistics;
    const DecodeStatistics decode_codes =
        m.format == Format::spqr ? decode_statistics_of<2>(m.stat_bits) : decode_statistics_of<1>(m.bits);
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        statistics.decode(m, panel, decode_codes);
        for (int64_t tile = 0; tile < panel.count; ++tile) {
            const int offset = group_of_tile(m, tile) * kRows;
            use((panel.first_tile + tile) * kColumns, panel.tiles + tile * m.bits * kRows, statistics.scale + offset,
                statistics.shift + offset);
        }
    }
}

// Calls use(first column, w) for each tile of a row block, w[column][row] being its weights in fp32, no outliers.
template <class Use>
inline void for_each_tile(const Matrix& m, int64_t row_block, const Use& use) {
    alignas(64) float w[kColumns * kRows];
    const DecodeTile decode = decode_tile_of(m.bits);
    const int group_shift = group_shift_in_tile(m);
    for_each_packed_tile(m, row_block,
                         [&](int64_t first, const uint32_t* tile, const float* scale, const float* shift) {
                             decode(tile, scale, shift, group_shift, w);
                             use(first, w);
                         });
}

}  // namespace
}  // namespace hf_spqr
