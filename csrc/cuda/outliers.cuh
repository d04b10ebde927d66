// Outliers of one row times up to 8 tokens, by one warp.
#pragma once
#include "cuda/kernels.h"
#include "cuda/tile.cuh"

namespace hf_spqr {

// Sums v[b] over the warp, in a fixed order, for all 8 b at once: afterwards v[0] of a lane is the sum for b =
// token_of(lane).
HF_DEVICE void sum_tokens(float (&v)[8], int lane) {
#pragma unroll
    for (int keep = 4, mask = 16; keep; keep /= 2, mask /= 2) {
        const bool upper = lane & mask;
#pragma unroll
        for (int i = 0; i < keep; ++i) {
            const float mine = upper ? v[i + keep] : v[i], other = upper ? v[i] : v[i + keep];
            v[i] = dev::add(mine, dev::shuffle_xor(other, mask));
        }
    }
    v[0] = dev::add(v[0], dev::shuffle_xor(v[0], 2));
    v[0] = dev::add(v[0], dev::shuffle_xor(v[0], 1));
}

HF_DEVICE int token_of(int lane) {
    return lane >> 2;
}

// v[b] = sum over the row's outliers of value * x[first_token + b][column], each lane its share of them.
HF_DEVICE void multiply_outliers(float (&v)[8], const LinearArgs& a, int row, int64_t first_token, int lane) {
    const int begin = a.weight.outlier_row[row], end = a.weight.outlier_row[row + 1];
    const int tokens = int(a.tokens - first_token < 8 ? a.tokens - first_token : 8);
    const uint16_t* x = a.x + first_token * a.x_stride;
    for (int i = begin + lane; i < end; i += 32) {
        const uint32_t entry = dev::load_stream(a.weight.outlier + i);
        const float value = dev::high_float(entry);
        const uint16_t* column = x + (entry & 0xffffu);
#pragma unroll
        for (int b = 0; b < 8; ++b) {
            if (b < tokens) v[b] = dev::fma(value, dev::low_float(column[b * a.x_stride]), v[b]);
        }
    }
}

}  // namespace hf_spqr
