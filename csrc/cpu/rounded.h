// Activations rounded to int8: a token's blocks of 128 columns, in stored order, have one fp32 scale each.
// hf_spqr/ops/reference.py says what is computed. Internal linkage (see vec.h).
#pragma once
#include "cpu/panels.h"

namespace hf_spqr {
namespace {

constexpr int kRoundedColumns = 128;  // of a block

// Columns of a block of which the sum of the codes is kept: those of a group.
inline int summed_columns(const Matrix& m) {
    return m.group == kPerChannel ? kRoundedColumns : m.group;
}

// Where the parts lie:
// - [block][token][column]: codes, zero padded;
// - [block][token]: scale;
// - [block][group of the block][token]: sum of the codes of a group's columns, as fp32;
// - [column][token], tokens padded to 16: code times scale, only where the matrix has outliers.
struct Rounded {
    int64_t blocks, groups, tokens, padded_tokens;
    char* memory;

    Rounded(const Matrix& m, int64_t token_count, char* start)
        : blocks(ceil_div(m.columns, kRoundedColumns)),
          groups(kRoundedColumns / summed_columns(m)),
          tokens(token_count),
          padded_tokens(m.outlier_row ? ceil_div(token_count, 16) * 16 : 0),
          memory(start) {}

    int64_t bytes() const {
        return blocks * (tokens * (kRoundedColumns + 4 + 4 * groups) + 4 * kRoundedColumns * padded_tokens);
    }
    int8_t* code(int64_t block, int64_t token) const {
        return reinterpret_cast<int8_t*>(memory) + (block * tokens + token) * kRoundedColumns;
    }
    float* scale(int64_t block) const { return reinterpret_cast<float*>(code(blocks, 0)) + block * tokens; }
    float* sum(int64_t block, int64_t group) const { return scale(blocks) + (block * groups + group) * tokens; }
    float* column(int64_t i) const { return sum(blocks, 0) + i * padded_tokens; }
};

}  // namespace
}  // namespace hf_spqr
