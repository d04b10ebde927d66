// Several tokens against any matrix: the tiles of a block are unpacked once, and vpdpbusd multiplies their codes by
// all tokens, as integers of one byte or two. Internal linkage (see vec.h).
#pragma once
#include "cpu/kernels.h"
#include "cpu/outliers_tokens.h"
#include "cpu/prefetch.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/token_blocks.h"
#include "cpu/unpack_vbmi.h"

namespace hf_spqr {
namespace {

constexpr int kVectors = kColumns / 4;            // of a tile
constexpr int kBlockVectors = kBlockColumns / 4;  // of a block of activations; panels begin with a block
constexpr int kBlockTiles = kBlockColumns / kColumns;
constexpr int kTogether = 6;  // tokens

template <int B>
void unpack_tile(const uint32_t* tile, char* out, int64_t stride) {
    static const Unpack<B> kUnpack;
    __m512i w[kVectors];
    kUnpack(tile, w);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) _mm512_store_si512(out + i * stride, w[i]);
}

using UnpackTile = void (*)(const uint32_t*, char*, int64_t);

UnpackTile unpack_tile_of(int bits) {
    constexpr UnpackTile kTable[8] = {unpack_tile<1>, unpack_tile<2>, unpack_tile<3>, unpack_tile<4>,
                                      unpack_tile<5>, unpack_tile<6>, unpack_tile<7>, unpack_tile<8>};
    return kTable[bits - 1];
}

// What tokens are multiplied by: R row blocks of a block.
template <int R>
struct Unpacked {
    alignas(64) uint32_t codes[kBlockVectors][R][kRows];  // four columns to a word
    int64_t block;
    int vectors;                      // of codes, fewer where the matrix ends
    const float *scale[R], *zero[R];  // [group][row]
};

// sum[token][r] = codes of `count` vectors * byte `Byte` of x; of the second one: added to 256 times what is there.
template <int Bytes, int Byte, int R, int T>
__attribute__((always_inline)) inline void dot(const uint32_t (*w)[R][kRows], int count, const int8_t* x,
                                               int32_t (*sum)[R][kRows]) {
    __m512i s[T][R];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            s[t][r] = Byte == 0 ? _mm512_setzero_si512() : _mm512_slli_epi32(_mm512_load_si512(sum[t][r]), 8);
        }
    }
    x += Byte * kBlockColumns;
    for (int i = 0; i < count; ++i, x += 4) {
        __m512i rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) rows[r] = _mm512_load_si512(w[i][r]);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            int32_t four;
            memcpy(&four, x + t * Bytes * kBlockColumns, sizeof four);
            const __m512i v = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) s[t][r] = _mm512_dpbusd_epi32(s[t][r], rows[r], v);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) _mm512_store_si512(sum[t][r], s[t][r]);
    }
}

// The same out of line, and as if `count` could be 0: else GCC 12 stores all sums in each turn of the loop.
template <int Bytes, int Byte, int R, int T>
__attribute__((noinline)) void dot_apart(const uint32_t (*w)[R][kRows], int count, const int8_t* x,
                                         int32_t (*sum)[R][kRows]) {
    asm("" : "+r"(count));
    dot<Bytes, Byte, R, T>(w, count, x, sum);
}

// Both bytes, or the only one, of `count` vectors; where they are few, all in one place.
template <int Bytes, int R, int T, bool Few>
__attribute__((always_inline)) inline void dots(const uint32_t (*w)[R][kRows], int count, const int8_t* x,
                                                int32_t (*sum)[R][kRows]) {
    (Few ? dot<Bytes, 0, R, T> : dot_apart<Bytes, 0, R, T>)(w, count, x, sum);
    if constexpr (Bytes > 1) (Few ? dot<Bytes, 1, R, T> : dot_apart<Bytes, 1, R, T>)(w, count, x, sum);
}

// scale * (sum - zero * sum of x)
__attribute__((always_inline)) inline __m512 shifted(const int32_t* sum, __m512 zero, float sum_of_x) {
    const __m512 f = _mm512_cvtepi32_ps(_mm512_load_si512(sum));
    return _mm512_fnmadd_ps(zero, _mm512_set1_ps(sum_of_x), f);
}

// y[token][r] += x's scale * weights' scale * (code . x - zero * sum of x), for T tokens. A block is one group.
template <int Bytes, int R, int T>
void multiply_long(const Unpacked<R>& w, const TokenBlocks<Bytes>& x, int64_t token, float (*y)[R][kRows]) {
    const float *sums = x.sum(w.block, 0) + token, *scales = x.scale(w.block, 0) + token;
    alignas(64) int32_t sum[T][R][kRows];
    dots<Bytes, R, T, false>(w.codes, w.vectors, x.code(w.block, token), sum);
    __m512 s[R], z[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) s[r] = _mm512_load_ps(w.scale[r]), z[r] = _mm512_load_ps(w.zero[r]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        const __m512 scale = _mm512_set1_ps(scales[t]);
        const float sum_of_x = sums[t];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 f = _mm512_mul_ps(shifted(sum[t][r], z[r], sum_of_x), scale);
            _mm512_store_ps(y[t][r], _mm512_fmadd_ps(s[r], f, _mm512_load_ps(y[t][r])));
        }
    }
}

// The same for a block of several groups, each Steps vectors long.
template <int Bytes, int R, int T, int Steps>
void multiply_short(const Unpacked<R>& w, const TokenBlocks<Bytes>& x, int64_t token, float (*y)[R][kRows]) {
    const int8_t* code = x.code(w.block, token);
    const float *sums = x.sum(w.block, 0) + token, *scales = x.scale(w.block, 0) + token;
    __m512 total[T][R];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[t][r] = _mm512_setzero_ps();
    }
    for (int at = 0, group = 0; at < w.vectors; at += Steps, group += kRows, sums += x.tokens) {
        alignas(64) int32_t sum[T][R][kRows];
        const int count = Steps <= kVectors || w.vectors - at > Steps ? Steps : w.vectors - at;
        dots<Bytes, R, T, Steps <= 4>(w.codes + at, count, code + 4 * at, sum);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 s = _mm512_load_ps(w.scale[r] + group), z = _mm512_load_ps(w.zero[r] + group);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                __m512 f = shifted(sum[t][r], z, sums[t]);
                if (Bytes > 1) f = _mm512_mul_ps(f, _mm512_set1_ps(scales[t]));
                total[t][r] = _mm512_fmadd_ps(s, f, total[t][r]);
            }
        }
        if (Bytes > 1) scales += x.tokens;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        const __m512 scale = _mm512_set1_ps(Bytes > 1 ? 1.f : scales[t]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            _mm512_store_ps(y[t][r], _mm512_fmadd_ps(scale, total[t][r], _mm512_load_ps(y[t][r])));
        }
    }
}

template <int Bytes, int R, int T, int Steps>
void multiply(const Unpacked<R>& w, const TokenBlocks<Bytes>& x, int64_t token, float (*y)[R][kRows]) {
    if constexpr (Steps == kBlockVectors) {
        multiply_long<Bytes, R, T>(w, x, token, y);
    } else {
        multiply_short<Bytes, R, T, Steps>(w, x, token, y);
    }
}

template <int Bytes, int R, int Steps>
void multiply_all(const Unpacked<R>& w, const TokenBlocks<Bytes>& x, float (*y)[R][kRows]) {
    using Multiply = void (*)(const Unpacked<R>&, const TokenBlocks<Bytes>&, int64_t, float (*)[R][kRows]);
    constexpr Multiply kMultiply[kTogether + 1] = {nullptr,
                                                   multiply<Bytes, R, 1, Steps>,
                                                   multiply<Bytes, R, 2, Steps>,
                                                   multiply<Bytes, R, 3, Steps>,
                                                   multiply<Bytes, R, 4, Steps>,
                                                   multiply<Bytes, R, 5, Steps>,
                                                   multiply<Bytes, R, 6, Steps>};
    const int64_t shares = ceil_div(x.tokens, kTogether);
    for (int64_t share = 0, token = 0; share < shares; ++share) {
        const int64_t next = x.tokens * (share + 1) / shares;
        kMultiply[next - token](w, x, token, y + token);
        token = next;
    }
}

template <int Bytes, int R, int Steps>
void row_blocks(const LinearArgs& a, int64_t row_block) {
    const Matrix& m = a.weight;
    const TokenBlocks<Bytes> x(m, a.tokens, a.planes);
    const UnpackTile unpack = unpack_tile_of(m.bits);
    const int64_t tile_words = int64_t(m.bits) * kRows;
    Ahead<R> ahead(m, row_block);
    alignas(64) float y[kPromptTokens][R][kRows];
    memset(y, 0, a.tokens * sizeof y[0]);
    PanelScales statistics[R];
    Unpacked<R> w;
    w.block = 0;
    OutlierPrefetch outliers(m, row_block, R);
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        outliers.panel();
        ahead.lines((panel.tiles - panel.statistics) / kRows);
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups);
        for (int64_t tile = 0; tile < panel.count; tile += kBlockTiles, ++w.block) {
            const int here = int(panel.count - tile < kBlockTiles ? panel.count - tile : kBlockTiles);
            const int group = group_of_tile(m, tile) * kRows;
            ahead.lines(here * m.bits);
            for (int r = 0; r < R; ++r) {
                const uint32_t* packed = panel.tiles + r * m.words + tile * tile_words;
                for (int i = 0; i < here; ++i) {
                    char* out = reinterpret_cast<char*>(w.codes[i * kVectors][r]);
                    unpack(packed + i * tile_words, out, sizeof w.codes[0]);
                }
                w.scale[r] = statistics[r].scale + group;
                w.zero[r] = statistics[r].zero + group;
            }
            w.vectors = here * kVectors;
            multiply_all<Bytes, R, Steps>(w, x, y);
        }
    }
    for (int r = 0; r < R; ++r) {
        add_outliers(m, row_block + r, x.column(0), x.padded_tokens, a.tokens, y[0][r], R * kRows);
        for (int t = 0; t < a.tokens; ++t) store_block(a, t, row_block + r, _mm512_load_ps(y[t][r]));
    }
}

template <int Bytes, int R, int Steps>
int64_t row_blocks(const LinearArgs& a, int64_t block, int64_t last) {
    for (; block + R <= last; block += R) row_blocks<Bytes, R, Steps>(a, block);
    return block;
}

template <int Bytes, int Steps>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    if constexpr (Steps == kBlockVectors) {  // registers hold the sums of four
        if (a.tokens > kTogether) first = row_blocks<Bytes, 4, Steps>(a, first, last);
    }
    first = row_blocks<Bytes, 2, Steps>(a, first, last);
    row_blocks<Bytes, 1, Steps>(a, first, last);
}

// Row blocks [first, last).
template <int Bytes>
void linear_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    switch (plane_block(a.weight)) {
        case 8:
            return all_row_blocks<Bytes, 2>(a, first, last);
        case 16:
            return all_row_blocks<Bytes, 4>(a, first, last);
        case 32:
            return all_row_blocks<Bytes, 8>(a, first, last);
        case 64:
            return all_row_blocks<Bytes, 16>(a, first, last);
        default:
            return all_row_blocks<Bytes, 32>(a, first, last);
    }
}

}  // namespace
}  // namespace hf_spqr
