// Codes of a tile as bytes, four columns of four rows at a time: what sdot multiplies by four activations. Columns
// come in the order in which they lie, so that most codes are one shift and one mask away. Internal linkage (see
// vec.h).
#pragma once
#include <arm_neon.h>
#include "cpu/matrix.h"
#include "cpu/three_bits.h"

namespace hf_spqr {
namespace {

constexpr int kWords = 8;  // of a tile of a row: four columns each

// Bytes 0 and 2 of word `word` hold the columns of pair `low`, bytes 1 and 3 those of pair `high`.
constexpr int low_pair(int bits, int word) {
    constexpr int kThree[kWords] = {0, 1, 2, 5, 8, 10, 11, 12};
    if (bits == 3) return kThree[word];
    const int per_byte = bits == 8 ? 1 : bits >= 4 ? 2 : 8 / bits;
    return word / per_byte * 2 * per_byte + word % per_byte;
}
constexpr int high_pair(int bits, int word) {
    constexpr int kThree[kWords] = {3, 6, 4, 7, 9, 13, 14, 15};
    if (bits == 3) return kThree[word];
    const int per_byte = bits == 8 ? 1 : bits >= 4 ? 2 : 8 / bits;
    return low_pair(bits, word) + per_byte;
}

// The column of byte i of a tile.
constexpr int column_at(int bits, int i) {
    const int pair = i % 2 ? high_pair(bits, i / 4) : low_pair(bits, i / 4);
    return 2 * pair + i % 4 / 2;
}

// Neighbouring columns, from a multiple of as many on, that share words with no others. Shorter groups are not served.
constexpr int columns_together(int bits) {
    return bits == 1 ? 32 : bits == 2 || bits == 3 ? 16 : bits == 8 ? 4 : 8;
}

// Codes are signed, for sdot: those of eight bits less 128.
constexpr int code_offset(int bits) {
    return bits == 8 ? 128 : 0;
}

// Three bits: a field one bit too high in its byte may stay there, doubled.
constexpr bool is_doubled(int bits, int i) {
    return bits == 3 && i % 2 && i / 4 != 2 && i / 4 != 7;
}

inline uint16x8_t load_words(const uint32_t* p) {
    return vreinterpretq_u16_u32(vld1q_u32(p));
}

// Pair 15 of three bits, in the highest bits of the half-words.
inline uint16x8_t spare_bits(const uint32_t* tile, int lane) {
    const uint16x8_t a = load_words(tile + lane), b = load_words(tile + kRows + lane);
    const uint16x8_t c = load_words(tile + 2 * kRows + lane), bc = vsriq_n_u16(c, b, 1);
    return vsriq_n_u16(bc, a, 2);
}

// Word `word` of rows lane .. lane + 4, codes of 1, 2, 3, 4 or 8 bits, but in the order of codes of Order bits. The
// low pair is at bit `s` of the half-words of v, the high pair at bit `t` of those of u.
template <int B, int Order, bool Doubled>
__attribute__((always_inline)) inline uint8x16_t fields(const uint32_t* tile, int lane, int word) {
    const int low = low_pair(Order, word), high = high_pair(Order, word);
    const int from = B == 3 ? kVector3[low] : low * B / 16, s = B == 3 ? kShift3[low] : low * B % 16;
    const int to = B == 3 ? kVector3[high] : high * B / 16,
              t = B == 3 ? (high == 15 ? 13 : kShift3[high]) : high * B % 16;
    const uint16x8_t v = load_words(tile + from * kRows + lane);
    const bool spare = B == 3 && high == 15;
    const uint16x8_t u = spare ? spare_bits(tile, lane) : load_words(tile + to * kRows + lane);
    constexpr int kMask = (1 << B) - 1;
    const bool doubled = Doubled && is_doubled(B, 4 * word + 1);
    const uint8x16_t mask = (uint8x16_t)vdupq_n_u16(uint16_t(kMask | kMask << (doubled ? 9 : 8)));
    if (from == to && !spare && t == s + (doubled ? 9 : 8)) {
        const uint8x16_t bytes = doubled ? (uint8x16_t)(v >> s) : (uint8x16_t)v >> s;
        return s + B == 8 && !doubled ? bytes : bytes & mask;
    }
    if (doubled) return vbslq_u8((uint8x16_t)vdupq_n_u16(0xff), (uint8x16_t)(v >> s), (uint8x16_t)u) & mask;
    const uint16x8_t first = v >> s, second = u >> t;
    return (uint8x16_t)vsliq_n_u16(first, second, 8) & mask;
}

template <int B, bool Doubled = false>
__attribute__((always_inline)) inline int8x16_t code_bytes(const uint32_t* tile, int lane, int word) {
    if constexpr (B == 8) {
        return (int8x16_t)(fields<8, 8, false>(tile, lane, word) ^ vdupq_n_u8(0x80));
    } else if constexpr (B == 5 || B == 6 || B == 7) {
        const uint8x16_t low = fields<4, B, false>(tile, lane, word);
        const uint8x16_t high = fields<B - 4, B, false>(tile + 4 * kRows, lane, word);
        return (int8x16_t)vsliq_n_u8(low, high, 4);
    } else {
        return (int8x16_t)fields<B, B, Doubled>(tile, lane, word);
    }
}

// sums[l][n] += word `first` + k of rows lane + 4l .. times x[n], of which four columns lie in lane k, k from 0 to 3.
template <int B, int L, int N, bool Doubled>
__attribute__((always_inline)) inline void add_products(const uint32_t* tile, int lane, int first, const int8x16_t* x,
                                                        int32x4_t (*sums)[N]) {
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
        int8x16_t w[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) w[k] = code_bytes<B, Doubled>(tile, lane + 4 * l, first + k);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            sums[l][n] = vdotq_laneq_s32(sums[l][n], w[0], x[n], 0);
            sums[l][n] = vdotq_laneq_s32(sums[l][n], w[1], x[n], 1);
            sums[l][n] = vdotq_laneq_s32(sums[l][n], w[2], x[n], 2);
            sums[l][n] = vdotq_laneq_s32(sums[l][n], w[3], x[n], 3);
        }
    }
}

}  // namespace
}  // namespace hf_spqr
