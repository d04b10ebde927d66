// A packed matrix as plain numbers and device pointers, and where its panels lie. The bytes: docs/format.md.
#pragma once
#include <cstdint>

namespace hf_spqr {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Format : int { spqr = 0, affine = 1 };
constexpr int kPerChannel = -1;

// Positions within a row block, in 32-bit words. Made by `panels_of`.
struct Panels {
    int tiles;            // weight tiles
    int groups;           // column groups
    int tile_shift;       // log2 of the tiles of a full panel, 30 when there is only one panel
    int group_shift;      // log2 of the columns of a group, 30 when there is only one group
    int panel_words;      // of a full panel
    int stat_words;       // statistics of a full panel
    int code_words;       // SpQR: first-level codes of a full panel
    int last_panel;       // the one that may be shorter
    int last_stat_words;  // its statistics
    int last_code_words;  // SpQR: its first-level codes
    int words;            // all of it
};

struct Matrix {
    Format format;
    int bits;
    int group;  // columns that share a scale, or kPerChannel
    int rows, columns;
    const uint32_t* packed;

    // SpQR
    int stat_bits;
    int groups_per_second;         // column groups that share a second level: 1 or 2
    const int32_t* outlier_row;    // [rows + 1]
    const uint32_t* outlier;       // fp16 << 16 | column; null when entries are wide
    const uint64_t* outlier_wide;  // fp16 << 32 | column

    // affine
    bool symmetric, scale_bf16;

    Panels panels;
};

inline int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

inline int log2_of(int power) {
    int shift = 0;
    while ((1 << shift) < power) ++shift;
    return shift;
}

// Vectors of first-level codes in an SpQR panel of `groups` groups. Where a code has at most 4 bits, only the vectors
// that hold one are stored.
inline int code_vectors(const Matrix& m, int groups) {
    if (m.stat_bits > 4) return m.stat_bits;
    if (m.stat_bits == 3) return groups <= 4 ? 1 : groups <= 10 ? 2 : 3;
    return ceil_div(groups, 16 / m.stat_bits);
}

// Vectors of statistics in a panel of `groups` groups.
inline int stat_vectors(const Matrix& m, int groups) {
    if (m.format == Format::spqr) {
        return code_vectors(m, groups) + ceil_div(4 * ceil_div(groups, m.groups_per_second), 32);
    }
    if (m.group == kPerChannel) return 1;
    return ceil_div(groups, 2) + (m.symmetric ? 0 : m.bits);
}

inline Panels panels_of(const Matrix& m) {
    const int per_panel = m.format == Format::spqr ? 16 : 32;
    const bool per_channel = m.group == kPerChannel;
    Panels p{};
    p.tiles = ceil_div(m.columns, 32);
    p.groups = per_channel ? 1 : ceil_div(m.columns, m.group);
    p.tile_shift = per_channel ? 30 : log2_of(per_panel * m.group / 32);
    p.group_shift = per_channel ? 30 : log2_of(m.group);
    p.last_panel = ceil_div(p.groups, per_panel) - 1;
    p.stat_words = 16 * stat_vectors(m, per_panel);
    const int last_groups = p.groups - p.last_panel * per_panel;
    p.last_stat_words = 16 * stat_vectors(m, last_groups);
    if (m.format == Format::spqr) {
        p.code_words = 16 * code_vectors(m, per_panel);
        p.last_code_words = 16 * code_vectors(m, last_groups);
    }
    const int full = p.last_panel > 0 ? 1 << p.tile_shift : 0;
    p.panel_words = p.stat_words + 16 * m.bits * full;
    p.words = p.last_panel * p.panel_words + p.last_stat_words + 16 * m.bits * (p.tiles - p.last_panel * full);
    return p;
}

}  // namespace hf_spqr
