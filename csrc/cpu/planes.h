// Activations as int16 = 256 * hi + lo in two planes of int8, for the integer dot product of VNNI. A block of columns
// shares one fp32 scale: x = scale * (256 * hi + lo) to within 2e-5 of the block's largest value.
#pragma once
#include "cpu/panels.h"

namespace hf_spqr {
namespace {

// Columns of a block: a group, at most 128, so that sums of 8-bit codes stay within int32.
inline int plane_block(const Matrix& m) {
    return m.group == kPerChannel ? 128 : m.group;
}

struct PlaneTile {  // of one token, 32 columns; four activations to a word
    int32_t hi[8], lo[8];
};

struct BlockNumbers {  // of one token
    float scale, sum;  // sum: of the activations, in fp32
};

// Where the parts lie: [tile][token], [block][token], and
// - for one token, (1, 1, sum, 1) per block, what the second level of SpQR's statistics is multiplied by;
// - for several tokens of a matrix with outliers, fp32 activations as [column][token], tokens padded to 16.
// Blocks are counted to whole panels of 16, so that kernels may read on.
struct Planes {
    int64_t tiles, blocks, tokens, padded_tokens;
    bool transposed;
    char* memory;

    Planes(const Matrix& m, int64_t token_count, char* start)
        : tokens(token_count),
          padded_tokens(ceil_div(token_count, 16) * 16),
          transposed(token_count > 1 && m.outlier_row != nullptr),
          memory(start) {
        tiles = ceil_div(m.columns, 128) * 4;
        blocks = ceil_div(tiles * kColumns / plane_block(m), 16) * 16;
    }

    int64_t bytes() const {
        const int64_t quads = tokens == 1 ? blocks * 16 : 0, columns = transposed ? tiles * kColumns : 0;
        return tiles * tokens * int64_t(sizeof(PlaneTile)) + blocks * tokens * int64_t(sizeof(BlockNumbers)) + quads +
               columns * padded_tokens * int64_t(sizeof(float));
    }
    PlaneTile* tile(int64_t i) const { return reinterpret_cast<PlaneTile*>(memory) + i * tokens; }
    BlockNumbers* block(int64_t i) const { return reinterpret_cast<BlockNumbers*>(tile(tiles)) + i * tokens; }
    float* quad(int64_t i) const { return reinterpret_cast<float*>(block(blocks)) + 4 * i; }
    float* column(int64_t i) const { return reinterpret_cast<float*>(block(blocks)) + padded_tokens * i; }
};

}  // namespace
}  // namespace hf_spqr
