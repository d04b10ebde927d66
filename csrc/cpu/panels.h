// Walks the panels of a row block. Internal linkage: included by files compiled for different instruction sets.
#pragma once
#include "cpu/matrix.h"

namespace hf_spqr {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Vectors of first-level codes in an SpQR panel of `groups` column groups. Where a code has at most 4 bits, only the
// vectors that hold one are stored; loading the whole tile is still safe, since at least 3 vectors follow.
inline int code_vectors(const Matrix& m, int groups) {
    if (m.stat_bits > 4) return m.stat_bits;
    if (m.stat_bits == 3) return groups <= 4 ? 1 : groups <= 10 ? 2 : 3;
    const int per_vector = 16 / m.stat_bits;
    return (groups + per_vector - 1) / per_vector;
}

struct Panel {
    const uint32_t* statistics;
    const uint32_t* tiles;
    int64_t first_tile;
    int groups;     // column groups of this panel
    int64_t count;  // weight tiles of this panel
};

constexpr int kMaxGroups = 32;  // of a panel

struct PanelWalk {
    const Matrix& m;
    int64_t groups_left, tiles_left, tiles_per_panel;
    int groups_per_panel;
    Panel panel;

    PanelWalk(const Matrix& matrix, int64_t row_block) : m(matrix) {
        tiles_left = ceil_div(m.columns, kColumns);
        const bool per_channel = m.group == kPerChannel;
        groups_left = per_channel ? 1 : ceil_div(m.columns, m.group);
        groups_per_panel = m.format == Format::spqr ? 16 : 32;
        tiles_per_panel = per_channel ? tiles_left : groups_per_panel * m.group / kColumns;
        panel = {nullptr, m.packed + row_block * m.words, 0, 0, 0};
    }

    // Vectors of statistics in a panel of `groups` column groups.
    int statistics_vectors(int groups) const {
        if (m.format == Format::spqr) {
            const int seconds = (groups + m.groups_per_second - 1) / m.groups_per_second;
            return code_vectors(m, groups) + (4 * seconds + 31) / 32;
        }
        if (m.group == kPerChannel) return 1;
        return (groups + 1) / 2 + (m.symmetric ? 0 : m.bits);
    }

    bool next() {
        if (tiles_left <= 0) return false;
        panel.statistics = panel.tiles + panel.count * m.bits * kRows;
        panel.first_tile += panel.count;
        panel.groups = groups_left < groups_per_panel ? int(groups_left) : groups_per_panel;
        panel.count = tiles_left < tiles_per_panel ? tiles_left : tiles_per_panel;
        panel.tiles = panel.statistics + statistics_vectors(panel.groups) * kRows;
        groups_left -= panel.groups;
        tiles_left -= panel.count;
        return true;
    }
};

// log2 of the columns of a tile that share statistics: 3, 4 or 5.
inline int group_shift_in_tile(const Matrix& m) {
    return m.group == 8 ? 3 : m.group == 16 ? 4 : 5;
}

// The group (of its panel) in which tile `tile_in_panel` of the panel begins.
inline int group_of_tile(const Matrix& m, int64_t tile_in_panel) {
    return m.group == kPerChannel ? 0 : int(tile_in_panel * kColumns >> __builtin_ctz(m.group));
}

}  // namespace
}  // namespace hf_spqr
