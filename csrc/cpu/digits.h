// A token's activations as integers of 24 bits, scale * (65536 a + 256 b + c), in three planes of signed bytes for
// ARM's integer dot product. A block of columns shares a scale: an activation is off by at most 2^-22 of the largest
// of its block, and mostly by a quarter of that. Internal linkage (see vec.h).
#pragma once
#include "cpu/code_bytes.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/vec.h"

namespace hf_spqr {
namespace {

constexpr int kDigits = 3;
constexpr int kMostTogether = 4;     // tokens
constexpr float kLargest = 8.35e6f;  // of the integers, so that each digit fits a signed byte however it is rounded

// Columns of a block: a group of 16 or more, at most 128, so that sums of two digits stay within int32.
inline int block_columns(const Matrix& m) {
    return m.group == kPerChannel || m.group > 128 ? 128 : m.group;
}

struct BlockOfToken {
    float scale, sum;  // of its activations
};

// The tokens in shares, as equal as can be, that are multiplied together. The parts of a share:
// [tile][token][digit][32 columns], then [block][token].
struct Digits {
    int64_t tiles, blocks, tokens, shares;
    char* memory;

    Digits(const Matrix& m, int64_t count, char* start)
        : tokens(count), shares(ceil_div(count, kMostTogether)), memory(start) {
        const int64_t columns = block_columns(m), whole = columns < kColumns ? kColumns : columns;
        tiles = ceil_div(m.columns, whole) * whole / kColumns;
        blocks = tiles * kColumns / columns;
    }
    int64_t bytes_of_token() const { return tiles * kDigits * kColumns + blocks * int64_t(sizeof(BlockOfToken)); }
    int64_t bytes() const { return tokens * bytes_of_token(); }
    int64_t begin(int64_t share) const { return tokens * share / shares; }
    int count(int64_t share) const { return int(begin(share + 1) - begin(share)); }
    int8_t* tile(int64_t share, int64_t i) const {
        return reinterpret_cast<int8_t*>(memory + begin(share) * bytes_of_token()) +
               i * count(share) * kDigits * kColumns;
    }
    BlockOfToken* block(int64_t share, int64_t i) const {
        return reinterpret_cast<BlockOfToken*>(tile(share, tiles)) + i * count(share);
    }
};

// 16 numbers less their lowest digit, which goes to `digit`, by 256.
inline void split_digit(int32x4_t* v, int8_t* digit) {
    const int16x8_t first = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
    const int16x8_t second = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
    vst1q_s8(digit, vcombine_s8(vmovn_s16(first), vmovn_s16(second)));
    for (int i = 0; i < 4; ++i) v[i] = vrshrq_n_s32(v[i], 8);
}

// How the columns of a tile are kept.
struct Arrangement {
    alignas(16) float factor[kColumns];     // what activations are multiplied by first
    alignas(16) int32_t repeats[kColumns];  // what makes up for it
    alignas(16) uint8_t column[kColumns];

    explicit Arrangement(int bits) {
        for (int i = 0; i < kColumns; ++i) {
            const int k = column_at(bits, i);
            column[i] = uint8_t(k);
            repeats[k] = is_doubled(bits, i) ? 2 : 1;
            factor[k] = 1.f / float(repeats[k]);
        }
    }
};

// x: zero padded to whole tiles. The sum of a block is that of its rounded activations, so that what rounding changes
// is multiplied by code - zero and not by the code alone.
inline void split_token(const Matrix& m, const Arrangement& order, const float* x, const Digits& digits, int64_t share,
                        int64_t token) {
    const int64_t columns = block_columns(m), end = ceil_div(m.columns, kColumns) * kColumns;
    alignas(16) int8_t stored[kDigits][kColumns];
    for (int64_t b = 0; b < digits.blocks; ++b) {
        const int64_t first = b * columns, last = first + columns < end ? first + columns : end;
        float32x4_t most = vdupq_n_f32(0.f);
        for (int64_t k = first; k < last; k += 4) most = vmaxq_f32(most, vabsq_f32(vld1q_f32(x + k)));  // NaN stays
        const float largest = vmaxvq_f32(most);
        const bool finite = largest <= 3.4028235e38f, zero = largest < 1e-30f;
        const float scale = !finite ? as_float(0x7fc00000u) : zero ? 0.f : largest / kLargest;
        const float inverse = !finite || zero ? 0.f : kLargest / largest;
        int32x4_t sum = vdupq_n_s32(0);
        for (int64_t k = first; k < first + columns; k += 16) {
            const int64_t half = k % kColumns;
            int32x4_t v[4];
            for (int i = 0; i < 4; ++i) {
                const float32x4_t own = finite && k < last ? vld1q_f32(x + k + 4 * i) : vdupq_n_f32(0.f);
                const float32x4_t factor = vmulq_n_f32(vld1q_f32(order.factor + half + 4 * i), inverse);
                v[i] = vcvtnq_s32_f32(vmulq_f32(own, factor));
                sum = vmlaq_s32(sum, v[i], vld1q_s32(order.repeats + half + 4 * i));
            }
            for (int d = kDigits - 1; d >= 0; --d) split_digit(v, stored[d] + half);
            if (half == 0) continue;
            int8_t* to = digits.tile(share, k / kColumns) + token * kDigits * kColumns;
            for (int d = 0; d < kDigits; ++d) {
                const uint8x16x2_t from = {{(uint8x16_t)vld1q_s8(stored[d]), (uint8x16_t)vld1q_s8(stored[d] + 16)}};
                for (int i = 0; i < kColumns; i += 16) {
                    vst1q_s8(to + d * kColumns + i, (int8x16_t)vqtbl2q_u8(from, vld1q_u8(order.column + i)));
                }
            }
        }
        digits.block(share, b)[token] = {scale, float(vaddvq_s32(sum)) * scale};
    }
}

}  // namespace
}  // namespace hf_spqr
