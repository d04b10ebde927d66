// Products of a few unpacked tiles with bf16 tokens. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/halves.h"

namespace hf_spqr {
namespace {

// R row blocks of a stretch of tiles, two columns to a word: their codes in bf16, or their weights.
template <int R>
struct Unpacked {
    alignas(64) uint32_t pair[kTiles * kPairs][R][kRows];
};

// What some tokens are multiplied by: `blocks` blocks of columns of `tiles` x Pairs column pairs each.
template <int R>
struct Part {
    const uint32_t (*codes)[R][kRows];
    int blocks, tiles;
    const float *scale[R], *zero[R];  // of the first block
    int64_t group_stride;             // to those of the next one
    int64_t tile, block;              // the first ones of the matrix
};

// The place of x that corresponds in the next share.
template <int T>
__attribute__((always_inline)) inline void prefetch_tokens(const uint32_t* x) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) _mm_prefetch(reinterpret_cast<const char*>(x + t * kPairs), _MM_HINT_T0);
}

// y += scale * (sum of code * x - zero * sum of x), for T tokens from `token` on and R row blocks. x: [tile][T][pair].
template <int T, int R, int Pairs>
void multiply(const Part<R>& part, const uint32_t* x, const float* minus_sum, int64_t tokens, float (*y)[R][kRows]) {
    // Totals stay in registers over short blocks, and leave their place to more sums over long ones.
    constexpr bool kKeep = Pairs < kPairs;
    __m512 total[T][R];
    if constexpr (kKeep) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[t][r] = _mm512_load_ps(y[t][r]);
        }
    }
    const uint32_t (*codes)[R][kRows] = part.codes;
    const int64_t share_words = int64_t(part.blocks) * part.tiles * T * Pairs;
    int pair = 0;  // in the tile
    for (int block = 0; block < part.blocks; ++block, minus_sum += tokens) {
        __m512 sum[T][R];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 zero = _mm512_load_ps(part.zero[r] + block * part.group_stride);
                sum[t][r] = _mm512_mul_ps(zero, _mm512_set1_ps(minus_sum[t]));
            }
        }
        for (int tile = 0; tile < part.tiles; ++tile, codes += Pairs) {
            if (pair == 0) prefetch_tokens<T>(x + share_words);
#pragma GCC unroll 16
            for (int p = 0; p < Pairs; ++p) {
                __m512bh w[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) w[r] = (__m512bh)_mm512_load_si512(codes[p][r]);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    const __m512bh b = (__m512bh)_mm512_set1_epi32(int(x[t * kPairs + pair + p]));
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], w[r], b);
                }
            }
            pair = (pair + Pairs) % kPairs;
            if (pair == 0) x += T * kPairs;
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 scale = _mm512_load_ps(part.scale[r] + block * part.group_stride);
                if constexpr (kKeep) {
                    total[t][r] = _mm512_fmadd_ps(scale, sum[t][r], total[t][r]);
                } else {
                    float* at = y[t][r];
                    _mm512_store_ps(at, _mm512_fmadd_ps(scale, sum[t][r], _mm512_load_ps(at)));
                }
            }
        }
    }
    if constexpr (kKeep) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) _mm512_store_ps(y[t][r], total[t][r]);
        }
    }
}

// y += sum of weight * x, for T tokens and R row blocks in `pairs` pairs of columns.
template <int T, int R>
void multiply_weights(const uint32_t (*weights)[R][kRows], int tiles, const uint32_t* x, float (*y)[R][kRows]) {
    __m512 sum[T][R];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[t][r] = _mm512_load_ps(y[t][r]);
    }
    for (int tile = 0; tile < tiles; ++tile, weights += kPairs, x += T * kPairs) {
        prefetch_tokens<T>(x + tiles * T * kPairs);
#pragma GCC unroll 16
        for (int p = 0; p < kPairs; ++p) {
            __m512bh w[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) w[r] = (__m512bh)_mm512_load_si512(weights[p][r]);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const __m512bh b = (__m512bh)_mm512_set1_epi32(int(x[t * kPairs + p]));
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], w[r], b);
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) _mm512_store_ps(y[t][r], sum[t][r]);
    }
}

template <int R, int Pairs>
void multiply_all(const Part<R>& part, const Halves& halves, float (*y)[R][kRows]) {
    using Multiply = void (*)(const Part<R>&, const uint32_t*, const float*, int64_t, float (*)[R][kRows]);
    constexpr Multiply kMultiply[kTokensAtOnce + 1] = {nullptr,
                                                       multiply<1, R, Pairs>,
                                                       multiply<2, R, Pairs>,
                                                       multiply<3, R, Pairs>,
                                                       multiply<4, R, Pairs>,
                                                       multiply<5, R, Pairs>,
                                                       multiply<6, R, Pairs>};
    const Shares shares(halves.tokens);
    const int64_t stretch = part.tile / halves.stretch * halves.stretch;
    for (int64_t share = 0; share < shares.count; ++share) {
        const int64_t first = shares.begin(share), count = shares.begin(share + 1) - first;
        const uint32_t* x = halves.share(stretch, first) + (part.tile - stretch) * count * kPairs;
        kMultiply[count](part, x, halves.minus_sum(part.block) + first, halves.tokens, y + first);
    }
}

// For a whole stretch.
template <int R>
void multiply_all(const uint32_t (*weights)[R][kRows], int64_t tile, int tiles, const Halves& halves,
                  float (*y)[R][kRows]) {
    using Multiply = void (*)(const uint32_t (*)[R][kRows], int, const uint32_t*, float (*)[R][kRows]);
    constexpr Multiply kMultiply[kTokensAtOnce + 1] = {
        nullptr,
        multiply_weights<1, R>,
        multiply_weights<2, R>,
        multiply_weights<3, R>,
        multiply_weights<4, R>,
        multiply_weights<5, R>,
        multiply_weights<6, R>,
    };
    const Shares shares(halves.tokens);
    for (int64_t share = 0; share < shares.count; ++share) {
        const int64_t first = shares.begin(share);
        kMultiply[shares.begin(share + 1) - first](weights, tiles, halves.share(tile, first), y + first);
    }
}

}  // namespace
}  // namespace hf_spqr
