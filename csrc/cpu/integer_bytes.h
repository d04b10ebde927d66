// The engine of integer_linear.h for VNNI: codes of weights as bytes against codes of activations as signed bytes.
// Internal linkage (see vec.h).
#pragma once
#include "cpu/integer_linear.h"
#include "cpu/unpack_vbmi.h"

namespace hf_spqr {
namespace {

constexpr int64_t kAhead = 2048;  // bytes of each row block's stream

struct Bytes {
    using Element = int8_t;
    static constexpr bool kTokenTiles = false, kArranged = false;
    static constexpr int kTileBytes = 512, kSteps = 8, kBlocks = 4, kTogether = 6, kFew = 4, kFewBlocks = 2;

    template <int B, int R>
    static void unpack_bits(const uint32_t* codes, int tiles, char* w) {
        static const Unpack<B> kUnpack;
        for (; tiles > 0; --tiles, codes += B * kRows, w += 8 * R * 64) {
            __m512i v[8];
            kUnpack(codes, v);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) _mm512_store_si512(w + i * R * 64, v[i]);
        }
    }

    template <int R, int T>
    static void accumulate(const char* w, int steps, const int8_t* x, int64_t x_stride, int32_t* sum, Ahead ahead) {
        __m512i s[T][R];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) s[t][r] = _mm512_load_si512(sum + (t * R + r) * kRows);
        }
        const int8_t* y = x + 3 * x_stride;  // of tokens 3 to 5: addresses of three tokens have one base
        for (int i = 0; i < steps; ++i, w += R * 64, x += 4, y += 4) {
            ahead.fetch();
            __m512i v[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) v[r] = _mm512_load_si512(w + r * 64);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const __m512i broadcast = word(t < 3 ? x + t * x_stride : y + (t - 3) * x_stride);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) s[t][r] = _mm512_dpbusd_epi32(s[t][r], v[r], broadcast);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) _mm512_store_si512(sum + (t * R + r) * kRows, s[t][r]);
        }
    }

    template <int B, int R, int T>
    static void few_of(const uint32_t* codes, int64_t words, int tiles, const int8_t* x, int64_t x_stride,
                       const int8_t* one, int32_t* sum, int32_t* weights) {
        constexpr int kChains = T == 1 ? 2 : 1;  // one alone would wait for itself
        static const Unpack<B> kUnpack;
        const Unpack<B> unpack = kUnpack;
        __m512i s[T][R][kChains], n[R][kChains];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
            for (int c = 0; c < kChains; ++c) {
                n[r][c] = c == 0 ? _mm512_load_si512(weights + r * kRows) : _mm512_setzero_si512();
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    s[t][r][c] = c == 0 ? _mm512_load_si512(sum + (t * R + r) * kRows) : _mm512_setzero_si512();
                }
            }
        }
        for (int tile = 0; tile < tiles; ++tile, codes += B * kRows, x += kColumns, one += kColumns) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const uint32_t* own = codes + r * words;
                for (int i = 0; i < B; ++i) __builtin_prefetch(reinterpret_cast<const char*>(own) + kAhead + i * 64);
                __m512i v[8];
                unpack(own, v);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    n[r][i % kChains] = _mm512_dpbusd_epi32(n[r][i % kChains], v[i], word(one + 4 * i));
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t) {
                        s[t][r][i % kChains] =
                            _mm512_dpbusd_epi32(s[t][r][i % kChains], v[i], word(x + t * x_stride + 4 * i));
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            _mm512_store_si512(weights + r * kRows, total(n[r]));
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) _mm512_store_si512(sum + (t * R + r) * kRows, total(s[t][r]));
        }
    }

    static __m512i word(const int8_t* x) {
        int32_t four;
        memcpy(&four, x, sizeof four);
        return _mm512_set1_epi32(four);
    }
    template <int N>
    static __m512i total(const __m512i (&s)[N]) {
        return N == 1 ? s[0] : _mm512_add_epi32(s[0], s[N - 1]);
    }

    template <int B, int R>
    static void few_bits(int tokens, const uint32_t* codes, int64_t words, int tiles, const int8_t* x,
                         int64_t x_stride, const int8_t* one, int32_t* sum, int32_t* weights) {
        switch (tokens) {
            case 1:
                return few_of<B, R, 1>(codes, words, tiles, x, x_stride, one, sum, weights);
            case 2:
                return few_of<B, R, 2>(codes, words, tiles, x, x_stride, one, sum, weights);
            case 3:
                return few_of<B, R, 3>(codes, words, tiles, x, x_stride, one, sum, weights);
            default:
                return few_of<B, R, 4>(codes, words, tiles, x, x_stride, one, sum, weights);
        }
    }

    template <int R>
    static void few(int tokens, int bits, const uint32_t* codes, int64_t words, int tiles, const int8_t* x,
                    int64_t x_stride, const int8_t* one, int32_t* sum, int32_t* weights) {
        constexpr decltype(&few_bits<8, R>) kTable[8] = {few_bits<1, R>, few_bits<2, R>, few_bits<3, R>,
                                                         few_bits<4, R>, few_bits<5, R>, few_bits<6, R>,
                                                         few_bits<7, R>, few_bits<8, R>};
        kTable[bits - 1](tokens, codes, words, tiles, x, x_stride, one, sum, weights);
    }
};

}  // namespace
}  // namespace hf_spqr
