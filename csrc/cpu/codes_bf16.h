// The codes of a tile as bf16, which holds them exactly: vector j has column pair j of 16 rows, as vdpbf16ps takes
// them. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/three_bits.h"
#include "cpu/unpack_vbmi.h"

namespace hf_spqr {
namespace {

// Pair 15 of a 3-bit tile, which lies in the spare bits of its vectors: in bits 0 to 2 of each half-word, zeros above.
inline __m512i spare_bits(const __m512i* vector) {
    const __m512i bit0 = _mm512_set1_epi16(1), low_bits = _mm512_set1_epi16(3);
    const __m512i low =
        _mm512_ternarylogic_epi64(bit0, _mm512_srli_epi16(vector[0], 15), _mm512_srli_epi16(vector[1], 14), 0xca);
    return _mm512_ternarylogic_epi64(low_bits, low, _mm512_srli_epi16(vector[2], 13), 0xca);
}

// Bits 1 to 4: a vpermw looks its low five index bits up in a table that repeats, so that the fields above need no
// masking.
template <int B>
struct CodesBf16 {
    static constexpr int kPerHalf = 16 / B;
    __m512i table;

    CodesBf16() {
        alignas(64) uint16_t value[32];
        for (int i = 0; i < 32; ++i) {
            const float f = float(i & ((1 << B) - 1));
            value[i] = uint16_t(_mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(f))) >> 16);
        }
        table = _mm512_load_si512(value);
    }

    template <int Pair>
    __attribute__((always_inline)) void from(const __m512i* vector, char* out, int64_t stride) const {
        if constexpr (Pair < 16) {
            constexpr int kVector = B == 3 ? kVector3[Pair] : Pair / kPerHalf;
            constexpr int kShift = B == 3 ? kShift3[Pair] : B * (Pair % kPerHalf);
            const __m512i field = _mm512_srli_epi16(vector[kVector], kShift);
            _mm512_store_si512(out + Pair * stride, _mm512_permutexvar_epi16(field, table));
            from<Pair + 1>(vector, out, stride);
        }
    }

    __attribute__((always_inline)) void operator()(const uint32_t* tile, char* out, int64_t stride) const {
        __m512i vector[4];
#pragma GCC unroll 4
        for (int i = 0; i < B; ++i) vector[i] = _mm512_loadu_si512(tile + i * kRows);
        if constexpr (B == 3) vector[3] = spare_bits(vector);
        from<0>(vector, out, stride);
    }
};

// Bits 5 to 8: from bytes.
template <int B>
struct CodesFromBytes {
    Unpack<B> unpack;

    __attribute__((always_inline)) void operator()(const uint32_t* tile, char* out, int64_t stride) const {
        __m512i w[8];
        unpack(tile, w);
        const __m512i byte = _mm512_set1_epi32(0xff), upper = _mm512_set1_epi32(int(0xffff0000));
        for (int i = 0; i < 16; ++i) {
            const __m512i pair = i % 2 ? _mm512_srli_epi32(w[i / 2], 16) : w[i / 2];
            const __m512 even = _mm512_cvtepi32_ps(_mm512_and_si512(pair, byte));
            const __m512 odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(pair, 8), byte));
            const __m512i high = _mm512_and_si512(_mm512_castps_si512(odd), upper);
            _mm512_store_si512(out + i * stride,
                               _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), high));
        }
    }
};
template <>
struct CodesBf16<5> : CodesFromBytes<5> {};
template <>
struct CodesBf16<6> : CodesFromBytes<6> {};
template <>
struct CodesBf16<7> : CodesFromBytes<7> {};
template <>
struct CodesBf16<8> : CodesFromBytes<8> {};

}  // namespace
}  // namespace hf_spqr
