// A token's activations as int16 = 256 * hi + lo in two planes of int8, for the integer dot product of VNNI. A block
// of columns shares one fp32 scale: x = scale * (256 * hi + lo) to within 2e-5 of the block's largest value, 4e-5
// where codes of 3 bits come doubled (unpack_half.h).
#pragma once
#include "cpu/panels.h"

namespace hf_spqr {
namespace {

// Columns of a block: a group, at most 128, so that sums of 8-bit codes stay within int32.
inline int plane_block(const Matrix& m) {
    return m.group == kPerChannel ? 128 : m.group;
}

struct PlaneTile {  // 32 columns; four activations to a word
    int32_t hi[8], lo[8];
};

constexpr int kMostTogether = 4;  // tokens that are multiplied together
constexpr int kMostFew = 8;       // tokens of a call, in shares of so many

// Where the parts of some tokens that are multiplied together lie, token by token: the tiles, then (scale, 1, sum of
// 256 * hi + lo, 1) per block, what the second level of SpQR's statistics is multiplied by. Blocks are counted to
// whole panels of 16, so that kernels may read on.
struct Planes {
    int64_t tiles, blocks;
    int tokens;
    char* memory;

    Planes(const Matrix& m, char* start, int count = 1)
        : tiles(ceil_div(m.columns, 128) * 4), tokens(count), memory(start) {
        blocks = ceil_div(tiles * kColumns / plane_block(m), 16) * 16;
    }

    int64_t bytes() const { return tokens * (tiles * int64_t(sizeof(PlaneTile)) + blocks * 16); }
    PlaneTile* tile(int64_t i, int token = 0) const {
        return reinterpret_cast<PlaneTile*>(memory) + i * tokens + token;
    }
    float* quad(int64_t i, int token = 0) const {
        return reinterpret_cast<float*>(tile(tiles)) + 4 * (i * tokens + token);
    }
};

// A few tokens in shares as equal as can be: the planes of all of them, then, where there are outliers, the fp32
// activations of each share's tokens beside each other, in 2 or 4 slots for each column.
struct FewTokens {
    const Matrix& m;
    int tokens, shares;
    char* memory;

    FewTokens(const Matrix& matrix, int64_t count, char* start)
        : m(matrix), tokens(int(count)), shares(int(ceil_div(count, kMostTogether))), memory(start) {}

    static constexpr int slots(int together) { return together <= 2 ? together : 4; }
    int begin(int share) const { return tokens * share / shares; }
    Planes planes(int share) const {
        const Planes before(m, memory, begin(share));
        return {m, memory + before.bytes(), begin(share + 1) - begin(share)};
    }
    // Of a share of several tokens.
    float* columns(int share) const {
        return reinterpret_cast<float*>(memory + Planes(m, memory, tokens).bytes()) +
               share * padded_columns() * kMostTogether;
    }
    int64_t padded_columns() const { return ceil_div(m.columns, kColumns) * kColumns; }
    int64_t bytes() const {
        const int64_t beside = m.outlier_row && tokens > 1 ? shares * padded_columns() * kMostTogether * 4 : 0;
        return Planes(m, memory, tokens).bytes() + beside;
    }
};

}  // namespace
}  // namespace hf_spqr
