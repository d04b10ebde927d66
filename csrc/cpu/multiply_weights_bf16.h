// Products of a stretch of weights in bf16 with tokens. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include <cstring>
#include "cpu/multiply_bf16.h"
#include "cpu/tables_bf16.h"

namespace hf_spqr {
namespace {

// R row blocks of a stretch of tiles, as many of them side by side as are multiplied together.
template <int R>
struct Weights {
    static constexpr int kTogether = R > 1 ? 2 : 1, kVectors = kTogether * kSides;
    using Quad = uint32_t[kVectors][kRows];
    alignas(64) Quad quad[R / kTogether][kTiles * kQuads];

    uint32_t* of_block(int r) { return quad[r / kTogether][0][r % kTogether * kSides]; }
};

// sum += weights of Count quads * x, for T tokens and V vectors of each quad, which are Stride apart. x: [T][pair].
template <int Count, int T, int V, int Stride>
__attribute__((always_inline)) inline void add_quads(const uint32_t* weights, const uint32_t* x, __m512 (*sum)[V]) {
#pragma GCC unroll 8
    for (int q = 0; q < Count; ++q, weights += Stride * kRows) {
        __m512bh w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) w[v] = (__m512bh)_mm512_load_si512(weights + v * kRows);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            int64_t four;  // columns, beside each row's weights
            memcpy(&four, x + t * kPairs + 2 * q, sizeof four);
            const __m512bh columns = (__m512bh)_mm512_set1_epi64(four);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[t][v] = _mm512_dpbf16_ps(sum[t][v], w[v], columns);
        }
    }
}

template <int T, int V>
__attribute__((always_inline)) inline void clear_sums(__m512 (*sum)[V]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[t][v] = _mm512_setzero_ps();
    }
}

// y[token * stride + row] += sum.
template <int T, int V>
__attribute__((always_inline)) inline void add_sums(const __m512 (*sum)[V], float* y, int64_t stride) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t, y += stride) {
#pragma GCC unroll 2
        for (int r = 0; r < V / kSides; ++r) {
            const __m512 part = sum_pairs(sum[t][r * kSides], sum[t][r * kSides + 1]);
            _mm512_store_ps(y + r * kRows, _mm512_add_ps(_mm512_load_ps(y + r * kRows), part));
        }
    }
}

template <int T, int V>
void multiply_weights(const uint32_t* weights, int tiles, const uint32_t* x, float* y, int64_t stride) {
    __m512 sum[T][V];
    clear_sums<T>(sum);
    for (int tile = 0; tile < tiles; ++tile, weights += kQuads * V * kRows, x += T * kPairs) {
        prefetch_tokens<T>(x + tiles * T * kPairs);
        add_quads<kQuads, T, V, V>(weights, x, sum);
    }
    add_sums<T>(sum, y, stride);
}

// All shares of tokens but the first.
template <int R>
void multiply_all(const Weights<R>& weights, int64_t tile, int tiles, const Halves& halves, float (*y)[R][kRows]) {
    using Multiply = void (*)(const uint32_t*, int, const uint32_t*, float*, int64_t);
    constexpr int kTogether = Weights<R>::kTogether, kVectors = Weights<R>::kVectors;
    constexpr Multiply kMultiply[kMostOfPrompt + 1] = {
        nullptr,
        multiply_weights<1, kVectors>,
        multiply_weights<2, kVectors>,
        multiply_weights<3, kVectors>,
        multiply_weights<4, kVectors>,
        multiply_weights<5, kVectors>,
        multiply_weights<6, kVectors>,
    };
    const Shares& shares = halves.shares;
    for (int64_t share = 1; share < shares.count; ++share) {
        const int64_t first = shares.begin(share);
        const Multiply run = kMultiply[shares.begin(share + 1) - first];
        for (int r = 0; r < R; r += kTogether) {
            run(weights.quad[r / kTogether][0][0], tiles, halves.share(tile, first), y[first][r], R * kRows);
        }
    }
}

}  // namespace
}  // namespace hf_spqr
