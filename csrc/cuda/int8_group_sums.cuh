// Groups on the int8 tensor cores, set by set. Where a group is narrower than a set of 128 columns, the mma see x of
// the threads only whose tiles belong to it, and the others' as zero.
#pragma once
#include "cuda/int8_product.cuh"
#include "cuda/int8_x.cuh"

namespace hf_spqr {

// The four sums of a lane's outputs in the group that is being added up.
template <int NT>
struct GroupSums {
    int product[NT][4] = {}, x[NT][4] = {}, w[4] = {};
    int x_zero[NT][2];

    HF_DEVICE GroupSums(const Int8Args& a, int64_t first_token, int tokens, int t) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int b = 8 * j + 2 * t + e;
                x_zero[j][e] = a.zero[first_token + (b < tokens ? b : 0)];
            }
        }
    }

    // Output e of token tile j: the integer times the group's scale.
    HF_DEVICE float term(int j, int e, int columns, const ScaleZero& s) const {
        const int all = product_of(columns, product[j][e], w[e & 2], x[j][e], int(s.zero), x_zero[j][e & 1]);
        return dev::mul(dev::float_of(all), s.scale);
    }

    HF_DEVICE void clear() {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            w[e] = 0;
#pragma unroll
            for (int j = 0; j < NT; ++j) product[j][e] = x[j][e] = 0;
        }
    }
};

// A set that begins at column `begin`; x: where the lane's token and tile of it begin. After each group calls
// close(its first column, its number of columns); the last group may be short.
template <int NT, class Close>
HF_DEVICE void multiply_groups(GroupSums<NT>& sums, const uint32_t (&operands)[4][4], const Matrix& m, int begin,
                               uint32_t x, int t, Close close) {
    const uint32_t ones[4] = {kOneBytes, kOneBytes, kOneBytes, kOneBytes};
    // Parts of a set that share no group, and the tiles of each.
    const int parts = m.group >= kSetColumns ? 1 : m.group > kColumns ? kSetColumns / m.group : 4;
    const int per_part = kTilesPerSet / parts, quarters = m.group >= kColumns ? 4 : m.group / 8;
    for (int part = 0; part < parts; ++part) {
        const bool mine = t / per_part == part;
        const uint32_t one = mine ? kOneBytes : 0;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            dev::mma_u8s8(sums.w, operands[q], one, one);
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                uint2 b = dev::load_shared2<0>(x + j * 8 * kStepBytes + 8 * q);
                if (!mine) b = make_uint2(0, 0);
                dev::mma_u8s8(sums.product[j], operands[q], b.x, b.y);
                dev::mma_u8s8(sums.x[j], ones, b.x, b.y);
            }
            if ((q + 1) % quarters) continue;
            const int of_part = parts == kTilesPerSet ? 8 * (q + 1) : per_part * kColumns;
            const int first = begin + part * per_part * kColumns + of_part - m.group, left = m.columns - first;
            if (left <= 0) continue;
            close(first, left < m.group ? left : m.group);
            sums.clear();
        }
    }
}

}  // namespace hf_spqr
