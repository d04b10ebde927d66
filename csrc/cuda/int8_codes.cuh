// From packed codes to bytes in the order of columns, which is what the int8 tensor cores take.
//
// A word holds the codes of even columns in its low half and of odd columns in its high half. One mask of it gives
// four codes as bytes wherever two codes of a half lie 8 bits apart: widths 2, 4 and 8, and the lower plane of 5,
// 6, 7. One byte permutation per four codes then brings columns in order.
#pragma once
#include "cuda/tile.cuh"

namespace hf_spqr {

template <int BITS>
constexpr bool kPlanes = BITS == 5 || BITS == 6 || BITS == 7;

// Column pairs A and B of one row of a tile as bytes: A even, B even, A odd, B odd.
template <int BITS, int A, int B>
HF_DEVICE uint32_t two_pairs(const uint32_t (&w)[BITS]) {
    if constexpr (kPlanes<BITS>) {
        uint32_t low[4], high[BITS - 4];
#pragma unroll
        for (int v = 0; v < 4; ++v) low[v] = w[v];
#pragma unroll
        for (int v = 0; v < BITS - 4; ++v) high[v] = w[4 + v];
        return two_pairs<4, A, B>(low) | field<BITS - 4, A, 4>(high) | field<BITS - 4, B, 12>(high);
    } else if constexpr (BITS != 3 && vector_of<BITS>(A) == vector_of<BITS>(B) &&
                         shift_of<BITS>(B) == shift_of<BITS>(A) + 8) {
        return w[vector_of<BITS>(A)] >> shift_of<BITS>(A) & Fields<BITS>::kMask * 0x01010101u;
    } else {
        return field<BITS, A, 0>(w) | field<BITS, B, 8>(w);
    }
}

// Half HALF of a row of a tile: 16 columns, column 4 i + j in byte j of out[i].
template <int BITS, int HALF>
HF_DEVICE void sixteen_codes(uint32_t (&out)[4], const uint32_t (&w)[BITS]) {
    constexpr int p = 8 * HALF;
    constexpr uint32_t first = 0x6420, second = 0x7531;  // bytes 0, 2 of both words; bytes 1, 3
    if constexpr (BITS == 2) {
        const uint32_t a = two_pairs<BITS, p, p + 4>(w), b = two_pairs<BITS, p + 1, p + 5>(w);
        const uint32_t c = two_pairs<BITS, p + 2, p + 6>(w), d = two_pairs<BITS, p + 3, p + 7>(w);
        out[0] = dev::select_bytes<first>(a, b);
        out[1] = dev::select_bytes<first>(c, d);
        out[2] = dev::select_bytes<second>(a, b);
        out[3] = dev::select_bytes<second>(c, d);
    } else if constexpr (BITS == 4 || kPlanes<BITS>) {
        const uint32_t a = two_pairs<BITS, p, p + 2>(w), b = two_pairs<BITS, p + 1, p + 3>(w);
        const uint32_t c = two_pairs<BITS, p + 4, p + 6>(w), d = two_pairs<BITS, p + 5, p + 7>(w);
        out[0] = dev::select_bytes<first>(a, b);
        out[1] = dev::select_bytes<second>(a, b);
        out[2] = dev::select_bytes<first>(c, d);
        out[3] = dev::select_bytes<second>(c, d);
    } else {
        constexpr uint32_t swap = 0x3120;
        const uint32_t all[4] = {two_pairs<BITS, p, p + 1>(w), two_pairs<BITS, p + 2, p + 3>(w),
                                 two_pairs<BITS, p + 4, p + 5>(w), two_pairs<BITS, p + 6, p + 7>(w)};
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = dev::select_bytes<swap>(all[i], all[i]);
    }
}

}  // namespace hf_spqr
