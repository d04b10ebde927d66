// Where the codes of a tile lie (docs/format.md), for compile-time and for run-time places.
//
// In a word, low and high half hold the two codes of a column pair at the same bits, so a mask alone gives a half2
// whose halves are fp16 subnormals: a code q at bit f of the half is q * 2^(f - 24), exactly. Two places per width,
// kLow and kHigh, take all fields with few shifts; their factors 2^(f - 24) are made up for by the scale that
// multiplies them.
#pragma once
#include "cuda/dev.cuh"
#include "cuda/matrix.h"

namespace hf_spqr {

constexpr int kRows = 16;        // rows of a row block, words of a vector
constexpr int kColumns = 32;     // columns of a tile
constexpr int kTilesPerSet = 4;  // one tile for each thread of a quad
constexpr int kStepColumns = 256;
constexpr int kStepTiles = kStepColumns / kColumns;

template <int BITS>
struct Fields {
    static constexpr int kLow = BITS == 2 ? 4 : BITS == 3 ? 3 : 0;
    static constexpr int kHigh = BITS == 2 ? 6 : BITS == 3 ? 6 : BITS == 4 ? 4 : 0;
    static constexpr uint32_t kMask = (1u << BITS) - 1;
};

constexpr int kVector3[16] = {0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 2, 2, 2, 2, 2, 0};
constexpr int kShift3[16] = {0, 3, 6, 9, 0, 3, 12, 12, 6, 9, 0, 3, 6, 9, 12, 15};

template <int BITS>
HF_CONSTANT int vector_of(int pair) {
    return BITS == 3 ? kVector3[pair] : pair / (16 / BITS);
}
template <int BITS>
HF_CONSTANT int shift_of(int pair) {
    return BITS == 3 ? kShift3[pair] : BITS * (pair % (16 / BITS));
}
// The place that column pair `pair` is brought to: kLow or kHigh.
template <int BITS>
HF_CONSTANT int place_of(int pair) {
    if (BITS == 8) return 0;
    if (BITS == 3) return kShift3[pair] == 6 || kShift3[pair] == 12 ? 6 : 3;
    return shift_of<BITS>(pair) % (2 * BITS) == 0 ? Fields<BITS>::kLow : Fields<BITS>::kHigh;
}

// Column pair PAIR of one row of a tile, each code at bit PLACE of its half.
template <int BITS, int PAIR, int PLACE>
HF_DEVICE uint32_t field(const uint32_t (&w)[BITS]) {
    constexpr uint32_t one = 0x00010001u << PLACE;
    if constexpr (BITS == 3 && PAIR == 15) {
        return (w[0] >> (15 - PLACE) & one) | (w[1] >> (14 - PLACE) & 2 * one) | (w[2] >> (13 - PLACE) & 4 * one);
    } else {
        constexpr int right = shift_of<BITS>(PAIR) - PLACE;
        constexpr uint32_t mask = Fields<BITS>::kMask * one;
        const uint32_t word = w[vector_of<BITS>(PAIR)];
        if constexpr (right >= 0) {
            return word >> right & mask;
        } else {
            return word << -right & mask;
        }
    }
}

// Run-time place, widths 1, 2, 3, 4, 8: both codes of a pair, even column in the low half. `word(v)` is vector v.
template <class Word>
HF_DEVICE uint32_t plain_pair(int bits, int pair, Word word) {
    if (bits == 3) {
        if (pair == 15) {
            return (word(0) >> 15 & 0x00010001u) | (word(1) >> 14 & 0x00020002u) | (word(2) >> 13 & 0x00040004u);
        }
        // kVector3 and kShift3 / 3 as nibbles of 64-bit numbers, pair 0 lowest
        const int vector = int(0x0222221110110000ull >> 4 * pair & 15);
        return word(vector) >> 3 * int(0x0432103244103210ull >> 4 * pair & 15) & 0x00070007u;
    }
    const int per_half = 16 / bits;
    return word(pair / per_half) >> bits * (pair % per_half) & ((1u << bits) - 1) * 0x00010001u;
}

// Any width 1 to 8; 5, 6, 7 are planes of 4 and the rest.
template <class Word>
HF_DEVICE uint32_t code_pair(int bits, int pair, Word word) {
    if (bits < 5 || bits == 8) return plain_pair(bits, pair, word);
    return plain_pair(4, pair, word) | plain_pair(bits - 4, pair, [&](int v) { return word(4 + v); }) << 4;
}

// Row `row` of the tile at `tile`.
HF_DEVICE uint32_t code_pair(int bits, int pair, const uint32_t* tile, int row) {
    return code_pair(bits, pair, [=](int v) { return tile[v * kRows + row]; });
}

// Where a row block begins. Row blocks past the end repeat the last one; their rows are not written.
HF_DEVICE const uint32_t* row_block_words(const Matrix& m, int64_t block) {
    const int64_t last = (m.rows - 1) / kRows;
    return m.packed + (block < last ? block : last) * m.panels.words;
}

// Where a tile begins in its row block, in words.
HF_DEVICE int tile_offset(const Matrix& m, int tile) {
    const int panel = tile >> m.panels.tile_shift;
    const int stats = panel == m.panels.last_panel ? m.panels.last_stat_words : m.panels.stat_words;
    return panel * m.panels.panel_words + stats + (tile - (panel << m.panels.tile_shift)) * m.bits * kRows;
}

}  // namespace hf_spqr
