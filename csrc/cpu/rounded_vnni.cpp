// Activations rounded to int8 against any matrix but those with groups of 8: a stretch of tiles is unpacked once, and
// vpdpbusd multiplies its codes by all tokens.
#include "cpu/kernels.h"
#include "cpu/outliers_avx512.h"
#include "cpu/prefetch.h"
#include "cpu/quantize.h"
#include "cpu/rounded.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/transpose.h"
#include "cpu/unpack_vbmi.h"

namespace hf_spqr {
namespace {

constexpr int kVectors = kColumns / 4;              // of a tile
constexpr int kBlockVectors = kRoundedColumns / 4;  // of a block of activations
constexpr int kBlockTiles = kRoundedColumns / kColumns;
constexpr int kStretchTiles = 4 * kBlockTiles;  // most of a stretch; panels begin with a block
constexpr int kTogether = 6;                    // tokens

// One block of a token; returns its scale.
template <DType D>
float round_block(const PrepareArgs& a, const Rounded& out, int64_t block, int64_t token) {
    const char* x = static_cast<const char*>(a.x) + token * a.x_stride * (D == DType::f32 ? 4 : 2);
    constexpr int kCount = kRoundedColumns / kLanes;
    __m512 v[kCount], largest = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
    for (int i = 0; i < kCount; ++i) {
        v[i] = (__m512)load_x<D>(x, a.perm, block * kRoundedColumns + i * kLanes, a.columns);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v[i]));
        bad = _mm512_add_ps(bad, _mm512_sub_ps(v[i], v[i]));  // zero but for NaN and infinity
    }
    const float top = _mm512_reduce_max_ps(largest);
    const float scale = (top <= 1e-30f ? 0.f : top / 127.f) + _mm512_reduce_add_ps(bad);
    const __mmask16 some = scale > 0.f ? 0xffff : 0;
    const int width = kRoundedColumns / int(out.groups) / kLanes;
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < kCount; ++i) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_maskz_div_ps(some, v[i], _mm512_set1_ps(scale)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out.code(block, token)) + i, _mm512_cvtepi32_epi8(code));
        sum = _mm512_add_epi32(sum, code);
        if ((i + 1) % width == 0) {
            out.sum(block, i / width)[token] = float(_mm512_reduce_add_epi32(sum));
            sum = _mm512_setzero_si512();
        }
    }
    return out.scale(block)[token] = scale;
}

template <DType D>
void round_tokens(const PrepareArgs& a, const Rounded& out, int64_t first, int64_t last) {
    for (int64_t block = 0; block < out.blocks; ++block) {
        for (int64_t token = first; token < last; ++token) round_block<D>(a, out, block, token);
    }
}

// What the codes of 16 tokens stand for, [column][token]. What lies beside the tokens is zero.
void transpose_tokens(const Rounded& out, int64_t first) {
    const int64_t last = out.tokens - first < kRows ? out.tokens : first + kRows;
    for (int64_t block = 0; block < out.blocks; ++block) {
        for (int column = 0; column < kRoundedColumns; column += kRows) {
            alignas(64) uint32_t x[kRows][kRows] = {};
            for (int64_t t = first; t < last; ++t) {
                const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(out.code(block, t) + column));
                const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(code));
                _mm512_store_ps(x[t - first], _mm512_mul_ps(v, _mm512_set1_ps(out.scale(block)[t])));
            }
            transpose(x[0], reinterpret_cast<char*>(out.column(block * kRoundedColumns + column) + first),
                      out.padded_tokens * 4);
        }
    }
}

void prepare(const PrepareArgs& a, int64_t first, int64_t last) {
    const Rounded out(*a.weight, a.tokens, a.planes);
    const auto round = a.dtype == DType::f32    ? round_tokens<DType::f32>
                       : a.dtype == DType::bf16 ? round_tokens<DType::bf16>
                                                : round_tokens<DType::f16>;
    round(a, out, first, last);
    if (!out.padded_tokens) return;
    for (int64_t token = first; token < last; token += kRows) transpose_tokens(out, token);
}

// Codes of R row blocks of a stretch, four columns to a word.
template <int R>
using Codes = uint32_t[kStretchTiles * kVectors][R][kRows];

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

// What tokens are multiplied by: `tiles` tiles from the first one of `block` on.
template <int R>
struct Part {
    const uint32_t (*codes)[R][kRows];
    int tiles;
    int64_t block;
    const float *scale[R], *zero[R];  // of the first group
    int64_t group_stride;             // to those of the next one
};

// sum[token][r] = codes of `count` vectors * x.
template <int R, int T>
__attribute__((always_inline)) inline void dot(const uint32_t (*w)[R][kRows], int count, const int8_t* x,
                                               int32_t (*sum)[R][kRows]) {
    __m512i s[T][R];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) s[t][r] = _mm512_setzero_si512();
    }
    for (int i = 0; i < count; ++i, x += 4) {
        __m512i rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) rows[r] = _mm512_load_si512(w[i][r]);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            int32_t four;
            memcpy(&four, x + t * kRoundedColumns, sizeof four);
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
template <int R, int T>
__attribute__((noinline)) void dot_apart(const uint32_t (*w)[R][kRows], int count, const int8_t* x,
                                         int32_t (*sum)[R][kRows]) {
    asm("" : "+r"(count));
    dot<R, T>(w, count, x, sum);
}

// scale * (sum - zero * sum of x)
__attribute__((always_inline)) inline __m512 shifted(const int32_t* sum, __m512 zero, float sum_of_x) {
    const __m512 f = _mm512_cvtepi32_ps(_mm512_load_si512(sum));
    return _mm512_fnmadd_ps(zero, _mm512_set1_ps(sum_of_x), f);
}

// y[token][r] += x's scale * weights' scale * (code . x - zero * sum of x), for T tokens. A block is one group.
template <int R, int T>
void multiply_long(const Part<R>& part, const Rounded& x, int64_t token, float (*y)[R][kRows]) {
    const uint32_t (*w)[R][kRows] = part.codes;
    int64_t group = 0, block = part.block;
    for (int left = part.tiles * kVectors; left > 0; left -= kBlockVectors, ++block, group += part.group_stride) {
        const int count = left < kBlockVectors ? left : kBlockVectors;
        alignas(64) int32_t sum[T][R][kRows];
        dot_apart<R, T>(w, count, x.code(block, token), sum);
        w += count;
        const float *sums = x.sum(block, 0) + token, *scales = x.scale(block) + token;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 s = _mm512_load_ps(part.scale[r] + group), z = _mm512_load_ps(part.zero[r] + group);
                const __m512 f = _mm512_mul_ps(shifted(sum[t][r], z, sums[t]), _mm512_set1_ps(scales[t]));
                _mm512_store_ps(y[t][r], _mm512_fmadd_ps(s, f, _mm512_load_ps(y[t][r])));
            }
        }
    }
}

// The same for blocks of several groups, each Steps vectors long.
template <int R, int T, int Steps>
void multiply_short(const Part<R>& part, const Rounded& x, int64_t token, float (*y)[R][kRows]) {
    const uint32_t (*w)[R][kRows] = part.codes;
    int64_t group = 0, block = part.block;
    for (int left = part.tiles * kVectors; left > 0; left -= kBlockVectors, ++block) {
        const int vectors = left < kBlockVectors ? left : kBlockVectors;
        const int8_t* code = x.code(block, token);
        const float *sums = x.sum(block, 0) + token, *scales = x.scale(block) + token;
        __m512 total[T][R];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[t][r] = _mm512_setzero_ps();
        }
        for (int at = 0; at < vectors; at += Steps, sums += x.tokens, group += kRows) {
            const int count = Steps == 4 || vectors - at > Steps ? Steps : vectors - at;
            alignas(64) int32_t sum[T][R][kRows];
            (Steps == 4 ? dot<R, T> : dot_apart<R, T>)(w, count, code + 4 * at, sum);
            w += count;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 s = _mm512_load_ps(part.scale[r] + group), z = _mm512_load_ps(part.zero[r] + group);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    total[t][r] = _mm512_fmadd_ps(s, shifted(sum[t][r], z, sums[t]), total[t][r]);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 before = _mm512_load_ps(y[t][r]);
                _mm512_store_ps(y[t][r], _mm512_fmadd_ps(_mm512_set1_ps(scales[t]), total[t][r], before));
            }
        }
    }
}

template <int R, int T, int Steps>
void multiply(const Part<R>& part, const Rounded& x, int64_t token, float (*y)[R][kRows]) {
    if constexpr (Steps == kBlockVectors) {
        multiply_long<R, T>(part, x, token, y);
    } else {
        multiply_short<R, T, Steps>(part, x, token, y);
    }
}

template <int R, int Steps>
void multiply_all(const Part<R>& part, const Rounded& x, float (*y)[R][kRows]) {
    using Multiply = void (*)(const Part<R>&, const Rounded&, int64_t, float (*)[R][kRows]);
    constexpr Multiply kMultiply[kTogether + 1] = {nullptr,
                                                   multiply<R, 1, Steps>,
                                                   multiply<R, 2, Steps>,
                                                   multiply<R, 3, Steps>,
                                                   multiply<R, 4, Steps>,
                                                   multiply<R, 5, Steps>,
                                                   multiply<R, 6, Steps>};
    const int64_t shares = ceil_div(x.tokens, kTogether);
    for (int64_t share = 0, token = 0; share < shares; ++share) {
        const int64_t next = x.tokens * (share + 1) / shares;
        kMultiply[next - token](part, x, token, y + token);
        token = next;
    }
}

template <int R, int Steps>
void row_blocks(const LinearArgs& a, int64_t row_block) {
    const Matrix& m = a.weight;
    const Rounded x(m, a.tokens, a.planes);
    const UnpackTile unpack = unpack_tile_of(m.bits);
    const int64_t ahead = pass_bytes(m, R), tile_words = int64_t(m.bits) * kRows;
    alignas(64) float y[kPromptTokens][R][kRows];
    memset(y, 0, a.tokens * sizeof y[0]);
    alignas(64) Codes<R> codes;
    PanelScales statistics[R];
    OutlierPrefetch outliers(m, row_block, R);
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        outliers.panel();
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups);
        for (int64_t tile = 0; tile < panel.count; tile += kStretchTiles) {
            const int here = int(panel.count - tile < kStretchTiles ? panel.count - tile : kStretchTiles);
            const int group = m.group == kPerChannel ? 0 : int(tile * kColumns / m.group) * kRows;
            Part<R> part{codes, here, (panel.first_tile + tile) / kBlockTiles,
                         {},    {},   m.group == kPerChannel ? 0 : kRows};
            for (int r = 0; r < R; ++r) {
                const uint32_t* packed = panel.tiles + r * m.words + tile * tile_words;
                prefetch_lines(reinterpret_cast<const char*>(packed) + ahead, here * m.bits);
                for (int i = 0; i < here; ++i) {
                    unpack(packed + i * tile_words, reinterpret_cast<char*>(codes[i * kVectors][r]), sizeof codes[0]);
                }
                part.scale[r] = statistics[r].scale + group;
                part.zero[r] = statistics[r].zero + group;
            }
            multiply_all<R, Steps>(part, x, y);
        }
    }
    for (int r = 0; r < R; ++r) {
        __m512 sum[kMaxTokens];
        for (int64_t first = 0; first < a.tokens; first += kMaxTokens) {
            const int64_t last = a.tokens - first < kMaxTokens ? a.tokens : first + kMaxTokens;
            for (int64_t t = first; t < last; ++t) sum[t - first] = _mm512_load_ps(y[t][r]);
            add_outliers(m, row_block + r, x.column(0) + first, x.padded_tokens, int(last - first), sum);
            for (int64_t t = first; t < last; ++t) store_block(a, t, row_block + r, sum[t - first]);
        }
    }
}

template <int Steps>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    constexpr int kAtOnce = Steps == kBlockVectors ? 4 : 2;  // as registers hold the sums
    int64_t block = first;
    for (; block + kAtOnce <= last; block += kAtOnce) row_blocks<kAtOnce, Steps>(a, block);
    for (; block < last; ++block) row_blocks<1, Steps>(a, block);
}

bool takes(const Matrix& m, DType, int64_t tokens) {
    return tokens > 1 && m.group != 8;
}

int64_t bytes(const Matrix& m, int64_t tokens) {
    return Rounded(m, tokens, nullptr).bytes();
}

void linear(const LinearArgs& a, int64_t first, int64_t last) {
    switch (summed_columns(a.weight)) {
        case 16:
            return all_row_blocks<4>(a, first, last);
        case 32:
            return all_row_blocks<8>(a, first, last);
        case 64:
            return all_row_blocks<16>(a, first, last);
        default:
            return all_row_blocks<32>(a, first, last);
    }
}

}  // namespace

extern const RoundedKernels kVnniRounded = {takes, bytes, prepare, linear};

}  // namespace hf_spqr
