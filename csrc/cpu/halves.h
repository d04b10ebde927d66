// Activations in bf16 for several tokens, in the order in which the kernels of BF16 take them.
#pragma once
#include "cpu/planes.h"

namespace hf_spqr {
namespace {

constexpr int kPairs = kColumns / 2;

// Where the parts lie:
// - [tile][token]: 32 columns, two neighbours to a word, zero padded;
// - [block][token]: minus the sum of a block of columns in fp32 (a group, at most 128 columns);
// - [column][token], tokens padded to 16, 32 or a multiple of 64, only where the matrix has outliers.
struct Halves {
    int64_t tiles, blocks, tokens, padded_tokens;
    char* memory;

    Halves(const Matrix& m, int64_t token_count, char* start)
        : tokens(token_count), padded_tokens(m.outlier_row ? padded(token_count) : 0), memory(start) {
        tiles = ceil_div(m.columns, 128) * 4;
        blocks = tiles * kColumns / plane_block(m);
    }

    static int64_t padded(int64_t tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : ceil_div(tokens, 64) * 64; }

    int64_t bytes() const {
        return tiles * tokens * kPairs * 4 + blocks * tokens * 4 + tiles * kColumns * padded_tokens * 2;
    }
    uint32_t* tile(int64_t i) const { return reinterpret_cast<uint32_t*>(memory) + i * tokens * kPairs; }
    float* minus_sum(int64_t block) const { return reinterpret_cast<float*>(tile(tiles)) + block * tokens; }
    uint16_t* column(int64_t i) const { return reinterpret_cast<uint16_t*>(minus_sum(blocks)) + i * padded_tokens; }
};

}  // namespace
}  // namespace hf_spqr
