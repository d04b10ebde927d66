// The weights of a tile in bf16. Internal linkage (see vec.h).
#pragma once
#include "cpu/codes_bf16.h"

namespace hf_spqr {
namespace {

// The codes of a tile as fp32 vectors of 16 rows. A vpermps looks its low four index bits up in a table that repeats,
// so that the fields above need no masking.
template <int B>
struct Values {
    static constexpr int kPerHalf = 16 / B;
    __m512i vector[4];
    __m512 table;

    Values() {
        alignas(64) float value[16];
        for (int i = 0; i < 16; ++i) value[i] = float(i & ((1 << B) - 1));
        table = _mm512_load_ps(value);
    }
    __attribute__((always_inline)) void load(const uint32_t* tile) {
#pragma GCC unroll 4
        for (int i = 0; i < B; ++i) vector[i] = _mm512_loadu_si512(tile + i * kRows);
        if constexpr (B == 3) vector[3] = spare_bits(vector);
    }
    template <int Pair, int Parity>
    __attribute__((always_inline)) __m512 get() const {
        constexpr int kVector = B == 3 ? kVector3[Pair] : Pair / kPerHalf;
        constexpr int kShift = (B == 3 ? kShift3[Pair] : B * (Pair % kPerHalf)) + 16 * Parity;
        // An upper half-word that ends with the field has zeros above it; a field of spare bits has them anyway.
        return _mm512_permutexvar_ps(_mm512_srli_epi32(vector[kVector], kShift), table);
    }
};

// The order in which two columns of 16 rows become 16 words.
inline __m512i pair_order() {
    alignas(64) uint16_t words[32];
    for (int r = 0; r < kRows; ++r) {
        words[2 * r] = uint16_t(r);
        words[2 * r + 1] = uint16_t(16 + r);
    }
    return _mm512_load_si512(words);
}

// Two columns of 16 rows in fp32 as 16 words of two bf16.
inline __m512i pair_of(__m512 even, __m512 odd, __m512i order) {
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// The weights of a tile from pair `Pair` on, rounded to bf16: pair j of 16 rows at out + j * stride.
template <int B, int Pair>
__attribute__((always_inline)) inline void pairs_from(const Values<B>& values, const float* scale, const float* zero,
                                                      int group_shift, __m512i order, char* out, int64_t stride) {
    if constexpr (Pair < 16) {
        const int group = (2 * Pair) >> group_shift;
        const __m512 s = _mm512_load_ps(scale + group * kRows), z = _mm512_load_ps(zero + group * kRows);
        const __m512 even = _mm512_mul_ps(_mm512_sub_ps(values.template get<Pair, 0>(), z), s);
        const __m512 odd = _mm512_mul_ps(_mm512_sub_ps(values.template get<Pair, 1>(), z), s);
        _mm512_store_si512(out + Pair * stride, pair_of(even, odd, order));
        pairs_from<B, Pair + 1>(values, scale, zero, group_shift, order, out, stride);
    }
}

// The code of one row in a column of a tile; `tile` points at the row's word.
template <int B>
inline uint32_t code_at(const uint32_t* tile, int column) {
    const int pair = column / 2, side = column % 2 * 16;
    if constexpr (B != 3) {
        constexpr int kPerHalf = 16 / B;
        return tile[pair / kPerHalf * kRows] >> (B * (pair % kPerHalf) + side) & ((1 << B) - 1);
    }
    if (pair < 15) return tile[kVector3[pair] * kRows] >> (kShift3[pair] + side) & 7;
    return (tile[0] >> (15 + side) & 1) | (tile[kRows] >> (14 + side) & 2) | (tile[2 * kRows] >> (13 + side) & 4);
}

}  // namespace
}  // namespace hf_spqr
