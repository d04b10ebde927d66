// Transposes a 16 x 16 block of words. Internal linkage (see vec.h).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include "cpu/matrix.h"

namespace hf_spqr {
namespace {

#if defined(__AVX512F__)

// out + r * stride = in[0][r] .. in[15][r]: pairs of words, of double words, then of 128-bit parts change places.
inline void transpose(const uint32_t* in, char* out, int64_t stride) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(in + i * kRows);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of each 128-bit part, for input rows i .. i + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {  // output rows c, c + 4, c + 8, c + 12
        const __m512i p = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), q = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
        const __m512i r = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88),
                      s = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
        _mm512_storeu_si512(out + c * stride, _mm512_shuffle_i32x4(p, r, 0x88));
        _mm512_storeu_si512(out + (c + 4) * stride, _mm512_shuffle_i32x4(q, s, 0x88));
        _mm512_storeu_si512(out + (c + 8) * stride, _mm512_shuffle_i32x4(p, r, 0xdd));
        _mm512_storeu_si512(out + (c + 12) * stride, _mm512_shuffle_i32x4(q, s, 0xdd));
    }
}

#elif defined(__aarch64__)

// The same in blocks of 4 x 4 words.
inline void transpose(const uint32_t* in, char* out, int64_t stride) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; i += 4) {
            const uint32_t* p = in + i * kRows + r;
            const uint32x4_t a = vld1q_u32(p), b = vld1q_u32(p + kRows);
            const uint32x4_t c = vld1q_u32(p + 2 * kRows), d = vld1q_u32(p + 3 * kRows);
            const uint64x2_t ab = (uint64x2_t)vtrn1q_u32(a, b), cd = (uint64x2_t)vtrn1q_u32(c, d);
            const uint64x2_t ab1 = (uint64x2_t)vtrn2q_u32(a, b), cd1 = (uint64x2_t)vtrn2q_u32(c, d);
            char* to = out + r * stride + i * 4;
            vst1q_u8(reinterpret_cast<uint8_t*>(to), (uint8x16_t)vtrn1q_u64(ab, cd));
            vst1q_u8(reinterpret_cast<uint8_t*>(to + stride), (uint8x16_t)vtrn1q_u64(ab1, cd1));
            vst1q_u8(reinterpret_cast<uint8_t*>(to + 2 * stride), (uint8x16_t)vtrn2q_u64(ab, cd));
            vst1q_u8(reinterpret_cast<uint8_t*>(to + 3 * stride), (uint8x16_t)vtrn2q_u64(ab1, cd1));
        }
    }
}

#else

inline void transpose(const uint32_t* in, char* out, int64_t stride) {
    for (int r = 0; r < kRows; ++r) {
        uint32_t row[kRows];
        for (int i = 0; i < kRows; ++i) row[i] = in[i * kRows + r];
        memcpy(out + r * stride, row, sizeof row);
    }
}

#endif

}  // namespace
}  // namespace hf_spqr
