// A tile as eight vectors of 64 codes, vector i holding columns 4i .. 4i + 3 of each row in the bytes of its word:
// what vpdpbusd multiplies by four activations. vpmultishiftqb takes eight fields out of a 64-bit lane at once.
#pragma once
#include <immintrin.h>
#include "cpu/matrix.h"

namespace hf_spqr {
namespace {

// Controls for fields at bits a and b of each half-word: bytes (even a, odd a, even b, odd b) of both words of a lane.
inline __m512i fields_at(int a, int b) {
    const uint64_t word = uint64_t(a) | uint64_t(a + 16) << 8 | uint64_t(b) << 16 | uint64_t(b + 16) << 24;
    return _mm512_set1_epi64(int64_t(word | (word + 0x20202020u) << 32));
}

template <int B>
struct Unpack {  // 1, 2, 4, 8: in order, two column pairs per vector
    static constexpr int kPairsOfHalf = 16 / B;
    static constexpr int kControls = B == 8 ? 1 : kPairsOfHalf / 2;
    __m512i control[kControls];
    __m512i mask = _mm512_set1_epi8(char((1 << B) - 1));

    Unpack() {
        for (int i = 0; i < kControls; ++i) control[i] = fields_at(2 * i * B, (2 * i + 1) * B);
    }

    __attribute__((always_inline)) void operator()(const uint32_t* tile, __m512i* w) const {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const __m512i v = _mm512_loadu_si512(tile + i / kControls * kRows);
            w[i] = _mm512_multishift_epi64_epi8(control[i % kControls], v);
            if (B != 8) w[i] = _mm512_and_si512(w[i], mask);
        }
    }
};

template <>
struct Unpack<3> {
    // Pairs 6, 7 and 14, 15 are the fifth fields of two vectors each; pair 15 lies in the spare bits of all three.
    __m512i low = fields_at(0, 3), middle = fields_at(6, 9), fifth = fields_at(12, 12), spare = fields_at(12, 13);
    __m512i mask = _mm512_set1_epi8(7);
    __m512i bit0 = _mm512_set1_epi16(0x2000), bit2 = _mm512_set1_epi16(short(0x8000));

    __attribute__((always_inline)) void operator()(const uint32_t* tile, __m512i* w) const {
        const __m512i a = _mm512_loadu_si512(tile), b = _mm512_loadu_si512(tile + kRows),
                      c = _mm512_loadu_si512(tile + 2 * kRows);
        constexpr __mmask64 kUpper = 0xccccccccccccccccu;  // bytes 2 and 3 of each word
        // Pair 15 in bits 13 to 15 of each half-word.
        __m512i s = _mm512_ternarylogic_epi64(bit0, _mm512_srli_epi32(a, 2), _mm512_srli_epi32(b, 1), 0xca);
        s = _mm512_ternarylogic_epi64(bit2, c, s, 0xca);
        w[0] = _mm512_multishift_epi64_epi8(low, a);
        w[1] = _mm512_multishift_epi64_epi8(middle, a);
        w[2] = _mm512_multishift_epi64_epi8(low, b);
        w[3] = _mm512_mask_multishift_epi64_epi8(_mm512_multishift_epi64_epi8(fifth, a), kUpper, fifth, b);
        w[4] = _mm512_multishift_epi64_epi8(middle, b);
        w[5] = _mm512_multishift_epi64_epi8(low, c);
        w[6] = _mm512_multishift_epi64_epi8(middle, c);
        w[7] = _mm512_mask_multishift_epi64_epi8(_mm512_multishift_epi64_epi8(spare, c), kUpper, spare, s);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) w[i] = _mm512_and_si512(w[i], mask);
    }
};

template <int Low, int High>
struct UnpackPlanes {
    Unpack<Low> low;
    Unpack<High> high;

    __attribute__((always_inline)) void operator()(const uint32_t* tile, __m512i* w) const {
        __m512i h[8];
        low(tile, w);
        high(tile + Low * kRows, h);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) w[i] = _mm512_or_si512(w[i], _mm512_slli_epi16(h[i], Low));
    }
};
template <>
struct Unpack<5> : UnpackPlanes<4, 1> {};
template <>
struct Unpack<6> : UnpackPlanes<4, 2> {};
template <>
struct Unpack<7> : UnpackPlanes<4, 3> {};

}  // namespace
}  // namespace hf_spqr
