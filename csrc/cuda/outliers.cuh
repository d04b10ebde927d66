// Outliers of a row times many tokens, by one warp.
#pragma once
#include "cuda/kernels.h"
#include "cuda/tile.cuh"

namespace hf_spqr {

// Sums each v[b] over the warp, in a fixed order: returns that of b = lane / (32 / COUNT).
template <int COUNT, int MASK = 16>
HF_DEVICE float sum_each(const float (&v)[COUNT], int lane) {
    if constexpr (COUNT == 1) {
        float sum = v[0];
#pragma unroll
        for (int mask = MASK; mask; mask /= 2) sum = dev::add(sum, dev::shuffle_xor(sum, mask));
        return sum;
    } else {
        constexpr int kHalf = COUNT / 2;
        const bool upper = lane & MASK;
        float half[kHalf];
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const float mine = upper ? v[i + kHalf] : v[i], other = upper ? v[i] : v[i + kHalf];
            half[i] = dev::add(mine, dev::shuffle_xor(other, MASK));
        }
        return sum_each<kHalf, MASK / 2>(half, lane);
    }
}

constexpr int kLaneTokens = 4;  // tokens of a lane

// v[b] = sum over the row's outliers of value * x[4 * (lane % (TOKENS / 4)) + b][column], from x column
// by column, so that all tokens of an outlier lie side by side. TOKENS / 4 lanes share an outlier.
template <int TOKENS>
HF_DEVICE void multiply_outliers(float (&v)[kLaneTokens], const LinearArgs& a, int row, int lane) {
    constexpr int kLanes = TOKENS / kLaneTokens, kTogether = 32 / kLanes, kAhead = 4;
    const uint16_t* x = a.x_columns + lane % kLanes * kLaneTokens;
    const int begin = a.weight.outlier_row[row] + lane / kLanes, end = a.weight.outlier_row[row + 1];
    for (int i = begin; i < end; i += kAhead * kTogether) {
        uint32_t entries[kAhead];
        uint2 of_x[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int index = i + k * kTogether;
            entries[k] = index < end ? dev::load_stream(a.weight.outlier + index) : 0u;
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            of_x[k] = {};
            if (i + k * kTogether < end) {
                of_x[k] = *reinterpret_cast<const uint2*>(x + int64_t(entries[k] & 0xffffu) * kLinearTokens);
            }
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const float value = dev::high_float(entries[k]);
            v[0] = dev::fma(value, dev::low_float(of_x[k].x), v[0]);
            v[1] = dev::fma(value, dev::high_float(of_x[k].x), v[1]);
            v[2] = dev::fma(value, dev::low_float(of_x[k].y), v[2]);
            v[3] = dev::fma(value, dev::high_float(of_x[k].y), v[3]);
        }
    }
#pragma unroll
    for (int mask = kLanes; mask < 32; mask *= 2) {
#pragma unroll
        for (int b = 0; b < kLaneTokens; ++b) v[b] = dev::add(v[b], dev::shuffle_xor(v[b], mask));
    }
}

}  // namespace hf_spqr
