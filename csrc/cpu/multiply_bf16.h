// Products of a few unpacked tiles with bf16 tokens. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/halves.h"

namespace hf_spqr {
namespace {

constexpr int kTiles = 4;  // unpacked at a time: a block of columns, or several
constexpr int kTokensAtOnce = 6;

// The codes of R row blocks in kTiles tiles.
template <int R>
struct Codes {
    alignas(64) uint32_t pair[kTiles * kPairs][R][kRows];
};

// What some tokens are multiplied by: `blocks` blocks of columns of `tiles` x Pairs column pairs each.
template <int R>
struct Part {
    const uint32_t (*codes)[R][kRows];
    int blocks, tiles;
    const float *scale[R], *zero[R];  // of the first block
    int64_t group_stride;             // to those of the next one
    const uint32_t* x;                // [tile][token][pair]
    const float* minus_sum;           // [block][token]
    int64_t tokens;
};

// y += scale * (sum of code * x - zero * sum of x), for T tokens from `token` on and R row blocks.
template <int T, int R, int Pairs>
void multiply(const Part<R>& part, int64_t token, float (*y)[R][kRows]) {
    // Totals stay in registers over short blocks, and leave their place to more sums over long ones.
    constexpr bool kKeep = Pairs < kPairs;
    __m512 total[T][R];
    if constexpr (kKeep) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[t][r] = _mm512_load_ps(y[token + t][r]);
        }
    }
    const uint32_t (*codes)[R][kRows] = part.codes;
    const uint32_t* x = part.x + token * kPairs;
    const float* minus_sum = part.minus_sum + token;
    const int64_t tile_stride = part.tokens * kPairs;
    int pair = 0;  // in the tile
    for (int block = 0; block < part.blocks; ++block, minus_sum += part.tokens) {
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
            if (pair == 0) x += tile_stride;
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 scale = _mm512_load_ps(part.scale[r] + block * part.group_stride);
                if constexpr (kKeep) {
                    total[t][r] = _mm512_fmadd_ps(scale, sum[t][r], total[t][r]);
                } else {
                    float* at = y[token + t][r];
                    _mm512_store_ps(at, _mm512_fmadd_ps(scale, sum[t][r], _mm512_load_ps(at)));
                }
            }
        }
    }
    if constexpr (kKeep) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) _mm512_store_ps(y[token + t][r], total[t][r]);
        }
    }
}

template <int R, int Pairs>
void multiply_all(const Part<R>& part, float (*y)[R][kRows]) {
    using Multiply = void (*)(const Part<R>&, int64_t, float (*)[R][kRows]);
    constexpr Multiply kMultiply[kTokensAtOnce + 1] = {nullptr,
                                                       multiply<1, R, Pairs>,
                                                       multiply<2, R, Pairs>,
                                                       multiply<3, R, Pairs>,
                                                       multiply<4, R, Pairs>,
                                                       multiply<5, R, Pairs>,
                                                       multiply<6, R, Pairs>};
    // As equal shares as can be: four and four tokens are faster than six and two.
    const int64_t shares = ceil_div(part.tokens, kTokensAtOnce);
    for (int64_t share = 0; share < shares; ++share) {
        const int64_t token = part.tokens * share / shares, next = part.tokens * (share + 1) / shares;
        kMultiply[next - token](part, token, y);
    }
}

}  // namespace
}  // namespace hf_spqr
