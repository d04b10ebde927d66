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

// Where the parts of one token's planes lie. Blocks are counted to whole panels of 16, so that kernels may read on.
struct Planes {
    int64_t columns, blocks;

    Planes(const Matrix& m)
        : columns(ceil_div(m.columns, 128) * 128), blocks(ceil_div(ceil_div(columns, plane_block(m)), 16) * 16) {}

    // quads: (1, 1, sum, 1) of a block, what second-level statistics are multiplied by.
    int64_t bytes() const { return 2 * columns + blocks * 4 * (1 + 4); }
    const int8_t* hi(const char* token) const { return reinterpret_cast<const int8_t*>(token); }
    const int8_t* lo(const char* token) const { return reinterpret_cast<const int8_t*>(token) + columns; }
    const float* scale(const char* token) const { return reinterpret_cast<const float*>(token + 2 * columns); }
    const float* quads(const char* token) const { return scale(token) + blocks; }
};

}  // namespace
}  // namespace hf_spqr
