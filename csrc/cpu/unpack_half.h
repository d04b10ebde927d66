// Half a tile as four vectors of 64 codes, a byte each: what vpdpbusd multiplies by four activations. Where
// unpack_vbmi.h keeps the columns in order, this takes the codes in the order that costs least: on Zen vpmultishiftqb
// shares the two ports of vpdpbusd, while shifts and masks have others. Activations are put into the same order
// (`HalfOrder`).
#pragma once
#include <immintrin.h>
#include "cpu/matrix.h"

namespace hf_spqr {
namespace {

// Whether few tokens' activations are kept in this order for this matrix: groups of 8 columns would be mixed by it.
inline bool has_half_order(const Matrix& m) {
    return m.group != 8 && (m.bits == 2 || m.bits == 3 || m.bits == 4 || m.bits == 8);
}

// The column pairs in bytes 0 and 1 of each word of the eight vectors of a tile: even columns. Bytes 2 and 3 hold the
// odd columns of the same pairs.
struct HalfOrder {
    uint8_t pair[8][2];
    uint32_t doubled;  // bit j: the codes of pair j come doubled, so its activations are taken half

    int column(int byte) const { return 2 * pair[byte / 4][byte % 2] + byte % 4 / 2; }
    bool is_doubled(int column) const { return doubled >> column / 2 & 1; }
};

inline const HalfOrder& half_order(int bits) {
    static constexpr HalfOrder kOrder2 = {{{0, 4}, {1, 5}, {2, 6}, {3, 7}, {8, 12}, {9, 13}, {10, 14}, {11, 15}}, 0};
    static constexpr HalfOrder kOrder3 = {{{0, 3}, {1, 6}, {5, 7}, {2, 4}, {10, 13}, {11, 14}, {8, 9}, {12, 15}},
                                          1 << 3 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14};
    static constexpr HalfOrder kOrder4 = {{{0, 2}, {1, 3}, {4, 6}, {5, 7}, {8, 10}, {9, 11}, {12, 14}, {13, 15}}, 0};
    static constexpr HalfOrder kOrder8 = {{{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}, {12, 13}, {14, 15}}, 0};
    return bits == 2 ? kOrder2 : bits == 3 ? kOrder3 : bits == 4 ? kOrder4 : kOrder8;
}

// Once, into a register: the compiler would rather load again than keep it.
__attribute__((always_inline)) inline __m512i load_once(const uint32_t* p) {
    __m512i v = _mm512_loadu_si512(p);
    asm("" : "+v"(v));
    return v;
}

// Bytes 0 and 2 of each word, bytes 1 and 3.
inline __m512i byte_masks(int even, int odd) {
    return _mm512_set1_epi16(short(odd << 8 | even));
}

// w | (v & mask)
__attribute__((always_inline)) inline __m512i or_masked(__m512i w, __m512i v, __m512i mask) {
    return _mm512_ternarylogic_epi64(w, v, mask, 0xf8);
}

template <int B>
struct UnpackHalf;

template <>
struct UnpackHalf<2> {
    __m512i mask = byte_masks(3, 3);

    template <int Half>
    __attribute__((always_inline)) void get(const uint32_t* tile, __m512i* w) const {
        const __m512i v = load_once(tile + Half * kRows);
        w[0] = _mm512_and_si512(v, mask);
        w[1] = _mm512_and_si512(_mm512_srli_epi32(v, 2), mask);
        w[2] = _mm512_and_si512(_mm512_srli_epi32(v, 4), mask);
        w[3] = _mm512_and_si512(_mm512_srli_epi32(v, 6), mask);
    }
};

template <>
struct UnpackHalf<4> {
    __m512i mask = byte_masks(15, 15);

    template <int Half>
    __attribute__((always_inline)) void get(const uint32_t* tile, __m512i* w) const {
        for (int i = 0; i < 2; ++i) {
            const __m512i v = load_once(tile + (2 * Half + i) * kRows);
            w[2 * i] = _mm512_and_si512(v, mask);
            w[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi32(v, 4), mask);
        }
    }
};

template <>
struct UnpackHalf<8> {
    template <int Half>
    __attribute__((always_inline)) void get(const uint32_t* tile, __m512i* w) const {
        for (int i = 0; i < 4; ++i) w[i] = _mm512_loadu_si512(tile + (4 * Half + i) * kRows);
    }
};

// Fields that begin at bit 1 of a byte stay there, doubled.
template <>
struct UnpackHalf<3> {
    __m512i both = byte_masks(7, 14), low = byte_masks(7, 0), high = byte_masks(0, 7),
            high_doubled = byte_masks(0, 14);
    // Pairs 12 (doubled) and 15, whose bits are the highest of each half-word: bits 0, 1 and 2 in this order.
    __m512i last = byte_masks(14, 4), bit1 = byte_masks(0, 2), bit0 = byte_masks(0, 1);

    template <int Half>
    __attribute__((always_inline)) void get(const uint32_t* tile, __m512i* w) const {
        const __m512i a = load_once(tile), b = load_once(tile + kRows);
        if constexpr (Half == 0) {
            w[0] = _mm512_and_si512(a, both);
            w[1] = _mm512_and_si512(_mm512_srli_epi32(a, 3), both);
            w[2] = _mm512_and_si512(_mm512_srli_epi32(b, 3), both);
            w[3] = or_masked(_mm512_and_si512(_mm512_srli_epi32(a, 6), low), _mm512_slli_epi32(b, 8), high);
        } else {
            const __m512i c = load_once(tile + 2 * kRows), b6 = _mm512_srli_epi32(b, 6);
            w[0] = _mm512_and_si512(c, both);
            w[1] = _mm512_and_si512(_mm512_srli_epi32(c, 3), both);
            w[2] = or_masked(_mm512_and_si512(b, high_doubled), b6, low);
            w[3] = or_masked(_mm512_and_si512(_mm512_srli_epi32(c, 5), last), b6, bit1);
            w[3] = or_masked(w[3], _mm512_srli_epi32(a, 7), bit0);
        }
    }
};

}  // namespace
}  // namespace hf_spqr
