// The engine of integer_linear.h without VNNI: pairs of 16-bit numbers, whose products are added up in 32 bits. (The
// product of bytes, vpmaddubsw, adds two products in 16 bits, which eight-bit codes exceed.) Internal linkage.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include "cpu/integer_linear.h"

namespace hf_spqr {
namespace {

// Codes of columns 2 * pair and 2 * pair + 1 in the two halves of each word, rows lane .. lane + kLanes.
template <int B>
inline VecU code_pairs(const uint32_t* tile, int pair, int lane) {
    constexpr uint32_t kMask = ((1u << B) - 1) * 0x10001u;
    if constexpr (B == 3) {
        if (pair == 15) {
            const VecU a = load(tile + lane), b = load(tile + kRows + lane), c = load(tile + 2 * kRows + lane);
            return (a >> 15 & 0x10001) | (b >> 14 & 0x20002) | (c >> 13 & 0x40004);
        }
        return load(tile + kVector3[pair] * kRows + lane) >> kShift3[pair] & kMask;
    } else if constexpr (B == 5 || B == 6 || B == 7) {
        return code_pairs<4>(tile, pair, lane) | code_pairs<B - 4>(tile + 4 * kRows, pair, lane) << 4;
    } else {
        constexpr int kPerHalf = 16 / B;
        return load(tile + pair / kPerHalf * kRows + lane) >> (B * (pair % kPerHalf)) & kMask;
    }
}

// s + the sums of the products of two pairs.
inline VecI add_products(VecI s, VecU w, int32_t x) {
#if defined(__AVX512BW__)
    return s + (VecI)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    return s + (VecI)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#elif defined(__SSE2__)
    return s + (VecI)_mm_madd_epi16((__m128i)w, _mm_set1_epi32(x));
#else
    return s + (VecI)(w & 0xffff) * int32_t(int16_t(x)) + (VecI)(w >> 16) * (x >> 16);
#endif
}

struct Pairs {
    using Element = int16_t;
    static constexpr bool kTokenTiles = false, kArranged = false;
    static constexpr int kTileBytes = 1024, kSteps = 16, kBlocks = 1, kFew = 0, kFewBlocks = 0;
#if defined(__aarch64__)
    static constexpr int kTogether = 4;  // NEON has twice the registers of SSE
#else
    static constexpr int kTogether = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;
#endif

    template <int B, int R>
    static void unpack_bits(const uint32_t* codes, int tiles, char* w) {
        for (; tiles > 0; --tiles, codes += B * kRows) {
#pragma GCC unroll 16
            for (int pair = 0; pair < kSteps; ++pair, w += R * 64) {
                for (int lane = 0; lane < kRows; lane += kLanes) {
                    const VecU v = code_pairs<B>(codes, pair, lane);
                    memcpy(w + lane * 4, &v, sizeof v);
                }
            }
        }
    }

    template <int R, int T>
    static void accumulate(const char* w, int steps, const int16_t* x, int64_t x_stride, int32_t* sum, Ahead ahead) {
        constexpr int kVectors = R * kRows / kLanes;
        VecI s[T][kVectors];
        memcpy(s, sum, sizeof s);
        for (int i = 0; i < steps; ++i, w += R * 64, x += 2) {
            ahead.fetch();
            VecU v[kVectors];
            memcpy(v, w, sizeof v);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                int32_t two;
                memcpy(&two, x + t * x_stride, sizeof two);
#pragma GCC unroll 4
                for (int k = 0; k < kVectors; ++k) s[t][k] = add_products(s[t][k], v[k], two);
            }
        }
        memcpy(sum, s, sizeof s);
    }
};

}  // namespace
}  // namespace hf_spqr
