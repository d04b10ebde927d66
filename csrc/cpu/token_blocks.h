// Activations of several tokens as integers of one or two bytes, for the integer dot product of VNNI. In one byte they
// are rounded, as hf_spqr/ops/reference.py says: 128 columns in stored order share a fp32 scale. Two bytes, 256 * hi +
// lo, hold them to within 2e-5 of the largest in a group (of at most 128 columns), which has its own scale. Internal
// linkage (see vec.h).
#pragma once
#include "cpu/planes.h"

namespace hf_spqr {
namespace {

constexpr int kBlockColumns = 128;

// Where the parts lie:
// - [block][token][byte][column]: codes, hi before lo, zero padded;
// - [block][scale of the block][token];
// - [block][group of the block][token]: sum of the codes of a group's columns, as fp32;
// - [column][token], tokens padded to 16: in one byte what the codes stand for, in two the values themselves,
//   only where the matrix has outliers.
template <int Bytes>
struct TokenBlocks {
    int64_t blocks, groups, scales, tokens, padded_tokens;
    char* memory;

    TokenBlocks(const Matrix& m, int64_t token_count, char* start)
        : blocks(ceil_div(m.columns, kBlockColumns)),
          groups(kBlockColumns / plane_block(m)),
          scales(Bytes == 1 ? 1 : groups),
          tokens(token_count),
          padded_tokens(m.outlier_row ? ceil_div(token_count, 16) * 16 : 0),
          memory(start) {}

    int64_t bytes() const {
        return blocks *
               (tokens * (Bytes * kBlockColumns + 4 * scales + 4 * groups) + 4 * kBlockColumns * padded_tokens);
    }
    int8_t* code(int64_t block, int64_t token) const {
        return reinterpret_cast<int8_t*>(memory) + (block * tokens + token) * Bytes * kBlockColumns;
    }
    float* scale(int64_t block, int64_t i) const {
        return reinterpret_cast<float*>(code(blocks, 0)) + (block * scales + i) * tokens;
    }
    float* sum(int64_t block, int64_t group) const { return scale(blocks, 0) + (block * groups + group) * tokens; }
    float* column(int64_t i) const { return sum(blocks, 0) + i * padded_tokens; }
};

}  // namespace
}  // namespace hf_spqr
