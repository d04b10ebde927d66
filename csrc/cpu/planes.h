// One token's activations as int16 = 256 * hi + lo in two planes of int8, for the integer dot product of VNNI. A block
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

// Where the parts lie: the tiles, then (scale, 1, sum of 256 * hi + lo, 1) per block, what the second level
// of SpQR's statistics is multiplied by. Blocks are counted to whole panels of 16, so that kernels may read on.
struct Planes {
    int64_t tiles, blocks;
    char* memory;

    Planes(const Matrix& m, char* start) : tiles(ceil_div(m.columns, 128) * 4), memory(start) {
        blocks = ceil_div(tiles * kColumns / plane_block(m), 16) * 16;
    }

    int64_t bytes() const { return tiles * int64_t(sizeof(PlaneTile)) + blocks * 16; }
    PlaneTile* tile(int64_t i) const { return reinterpret_cast<PlaneTile*>(memory) + i; }
    float* quad(int64_t i) const { return reinterpret_cast<float*>(tile(tiles)) + 4 * i; }
};

}  // namespace
}  // namespace hf_spqr
