// Products of a few unpacked tiles with bf16 tokens. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/halves.h"

namespace hf_spqr {
namespace {

// The codes in bf16 of R row blocks of a stretch of tiles, two columns to a word.
template <int R>
struct Unpacked {
    alignas(64) uint32_t pair[kTiles / 2 * kPairs][R][kRows];
};

// What tokens are multiplied by: `blocks` blocks of columns of `tiles` tiles each, or several in each of `tiles`
// tiles.
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

// sum = -zero * sum of x.
template <int T, int R>
__attribute__((always_inline)) inline void start_sums(const float* const* zero, int64_t offset, const float* minus_sum,
                                                      __m512 (*sum)[R]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const __m512 z = _mm512_load_ps(zero[r] + offset);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[t][r] = _mm512_mul_ps(z, _mm512_set1_ps(minus_sum[t]));
    }
}

// sum += codes or weights of Count column pairs * x.
template <int T, int R, int Count>
__attribute__((always_inline)) inline void add_pairs(const uint32_t (*w)[R][kRows], const uint32_t* x,
                                                     __m512 (*sum)[R]) {
#pragma GCC unroll 16
    for (int p = 0; p < Count; ++p) {
        __m512bh rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) rows[r] = (__m512bh)_mm512_load_si512(w[p][r]);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(x[t * kPairs + p]));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], rows[r], pair);
        }
    }
}

template <int T, int R>
__attribute__((always_inline)) inline void load_sums(const float (*y)[R][kRows], __m512 (*sum)[R]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[t][r] = _mm512_load_ps(y[t][r]);
    }
}

template <int T, int R>
__attribute__((always_inline)) inline void store_sums(const __m512 (*sum)[R], float (*y)[R][kRows]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) _mm512_store_ps(y[t][r], sum[t][r]);
    }
}

// y += scale * (sum of code * x - zero * sum of x), for T tokens and R row blocks. x: [tile][T][pair]; minus_sum:
// [block][tokens]. A block is Pairs column pairs, less than a tile: totals stay in registers.
template <int T, int R, int Pairs>
void multiply_short(const Part<R>& part, const uint32_t* x, const float* minus_sum, int64_t tokens,
                    float (*y)[R][kRows]) {
    const uint32_t (*codes)[R][kRows] = part.codes;
    const float *scale[R], *zero[R];
    for (int r = 0; r < R; ++r) scale[r] = part.scale[r], zero[r] = part.zero[r];
    __m512 total[T][R];
    load_sums<T, R>(y, total);
    for (int tile = 0; tile < part.tiles; ++tile, codes += kPairs, x += T * kPairs) {
        prefetch_tokens<T>(x + part.tiles * T * kPairs);
#pragma GCC unroll 4
        for (int i = 0; i < kPairs / Pairs; ++i, minus_sum += tokens) {
            __m512 sum[T][R];
            start_sums<T, R>(zero, i * kRows, minus_sum, sum);
            add_pairs<T, R, Pairs>(codes + i * Pairs, x + i * Pairs, sum);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 s = _mm512_load_ps(scale[r] + i * kRows);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) total[t][r] = _mm512_fmadd_ps(s, sum[t][r], total[t][r]);
            }
        }
        for (int r = 0; r < R; ++r) scale[r] += kPairs / Pairs * kRows, zero[r] += kPairs / Pairs * kRows;
    }
    store_sums<T, R>(total, y);
}

// The same for blocks of one or more tiles: totals leave their place in registers to sums.
template <int T, int R>
void multiply_long(const Part<R>& part, const uint32_t* x, const float* minus_sum, int64_t tokens,
                   float (*y)[R][kRows]) {
    const uint32_t (*codes)[R][kRows] = part.codes;
    const int64_t share_words = int64_t(part.blocks) * part.tiles * T * kPairs;
    for (int block = 0; block < part.blocks; ++block, minus_sum += tokens) {
        __m512 sum[T][R];
        start_sums<T, R>(part.zero, block * part.group_stride, minus_sum, sum);
        for (int tile = 0; tile < part.tiles; ++tile, codes += kPairs, x += T * kPairs) {
            prefetch_tokens<T>(x + share_words);
            add_pairs<T, R, kPairs>(codes, x, sum);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 s = _mm512_load_ps(part.scale[r] + block * part.group_stride);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                _mm512_store_ps(y[t][r], _mm512_fmadd_ps(s, sum[t][r], _mm512_load_ps(y[t][r])));
            }
        }
    }
}

template <int T, int R, int Pairs>
void multiply(const Part<R>& part, const uint32_t* x, const float* minus_sum, int64_t tokens, float (*y)[R][kRows]) {
    if constexpr (Pairs < kPairs) {
        multiply_short<T, R, Pairs>(part, x, minus_sum, tokens, y);
    } else {
        multiply_long<T, R>(part, x, minus_sum, tokens, y);
    }
}

template <int R, int Pairs>
void multiply_all(const Part<R>& part, const Halves& halves, float (*y)[R][kRows]) {
    using Multiply = void (*)(const Part<R>&, const uint32_t*, const float*, int64_t, float (*)[R][kRows]);
    constexpr Multiply kMultiply[kMostOfShare + 1] = {
        nullptr,
        multiply<1, R, Pairs>,
        multiply<2, R, Pairs>,
        multiply<3, R, Pairs>,
        multiply<4, R, Pairs>,
        multiply<5, R, Pairs>,
        multiply<6, R, Pairs>,
        multiply<7, R, Pairs>,
        multiply<8, R, Pairs>,
    };
    const Shares& shares = halves.shares;
    const int64_t stretch = part.tile / halves.stretch * halves.stretch;
    for (int64_t share = 0; share < shares.count; ++share) {
        const int64_t first = shares.begin(share), count = shares.begin(share + 1) - first;
        const uint32_t* x = halves.share(stretch, first) + (part.tile - stretch) * count * kPairs;
        kMultiply[count](part, x, halves.minus_sum(part.block) + first, halves.tokens, y + first);
    }
}

}  // namespace
}  // namespace hf_spqr
