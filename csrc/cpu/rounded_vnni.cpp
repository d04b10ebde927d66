// Activations rounded to int8 against any matrix but those with groups of 8: the tiles of a block are unpacked once,
// and vpdpbusd multiplies their codes by all tokens.
#include "cpu/kernels.h"
#include "cpu/outliers_tokens.h"
#include "cpu/prefetch.h"
#include "cpu/quantize.h"
#include "cpu/rounded.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/unpack_vbmi.h"

namespace hf_spqr {
namespace {

constexpr int kVectors = kColumns / 4;              // of a tile
constexpr int kBlockVectors = kRoundedColumns / 4;  // of a block of activations; panels begin with a block
constexpr int kBlockTiles = kRoundedColumns / kColumns;
constexpr int kTogether = 6;  // tokens

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
void multiply_long(const Unpacked<R>& w, const Rounded& x, int64_t token, float (*y)[R][kRows]) {
    const float *sums = x.sum(w.block, 0) + token, *scales = x.scale(w.block) + token;
    alignas(64) int32_t sum[T][R][kRows];
    dot_apart<R, T>(w.codes, w.vectors, x.code(w.block, token), sum);
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
template <int R, int T, int Steps>
void multiply_short(const Unpacked<R>& w, const Rounded& x, int64_t token, float (*y)[R][kRows]) {
    const int8_t* code = x.code(w.block, token);
    const float *sums = x.sum(w.block, 0) + token, *scales = x.scale(w.block) + token;
    __m512 total[T][R];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[t][r] = _mm512_setzero_ps();
    }
    for (int at = 0, group = 0; at < w.vectors; at += Steps, sums += x.tokens, group += kRows) {
        alignas(64) int32_t sum[T][R][kRows];
        if constexpr (Steps == 4) {
            dot<R, T>(w.codes + at, Steps, code + 4 * at, sum);
        } else {
            dot_apart<R, T>(w.codes + at, w.vectors - at < Steps ? w.vectors - at : Steps, code + 4 * at, sum);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 s = _mm512_load_ps(w.scale[r] + group), z = _mm512_load_ps(w.zero[r] + group);
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

template <int R, int T, int Steps>
void multiply(const Unpacked<R>& w, const Rounded& x, int64_t token, float (*y)[R][kRows]) {
    if constexpr (Steps == kBlockVectors) {
        multiply_long<R, T>(w, x, token, y);
    } else {
        multiply_short<R, T, Steps>(w, x, token, y);
    }
}

template <int R, int Steps>
void multiply_all(const Unpacked<R>& w, const Rounded& x, float (*y)[R][kRows]) {
    using Multiply = void (*)(const Unpacked<R>&, const Rounded&, int64_t, float (*)[R][kRows]);
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
        kMultiply[next - token](w, x, token, y + token);
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
    PanelScales statistics[R];
    Unpacked<R> w;
    w.block = 0;
    OutlierPrefetch outliers(m, row_block, R);
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        outliers.panel();
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups);
        for (int64_t tile = 0; tile < panel.count; tile += kBlockTiles, ++w.block) {
            const int here = int(panel.count - tile < kBlockTiles ? panel.count - tile : kBlockTiles);
            const int group = group_of_tile(m, tile) * kRows;
            for (int r = 0; r < R; ++r) {
                const uint32_t* packed = panel.tiles + r * m.words + tile * tile_words;
                prefetch_lines(reinterpret_cast<const char*>(packed) + ahead, here * m.bits);
                for (int i = 0; i < here; ++i) {
                    char* out = reinterpret_cast<char*>(w.codes[i * kVectors][r]);
                    unpack(packed + i * tile_words, out, sizeof w.codes[0]);
                }
                w.scale[r] = statistics[r].scale + group;
                w.zero[r] = statistics[r].zero + group;
            }
            w.vectors = here * kVectors;
            multiply_all<R, Steps>(w, x, y);
        }
    }
    for (int r = 0; r < R; ++r) {
        add_outliers(m, row_block + r, x.column(0), x.padded_tokens, a.tokens, y[0][r], R * kRows);
        for (int t = 0; t < a.tokens; ++t) store_block(a, t, row_block + r, _mm512_load_ps(y[t][r]));
    }
}

template <int R, int Steps>
int64_t row_blocks(const LinearArgs& a, int64_t block, int64_t last) {
    for (; block + R <= last; block += R) row_blocks<R, Steps>(a, block);
    return block;
}

template <int Steps>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    if constexpr (Steps == kBlockVectors) {  // registers hold the sums of four
        if (a.tokens > kTogether) first = row_blocks<4, Steps>(a, first, last);
    }
    first = row_blocks<2, Steps>(a, first, last);
    row_blocks<1, Steps>(a, first, last);
}

// Where it was measured to be faster than the exact kernels: not for one token, which memory limits, nor for prompts
// where there are outliers.
bool takes(const Matrix& m, DType, int64_t tokens) {
    return m.group != 8 && tokens > 1 && (tokens <= kMaxTokens || m.outlier_row == nullptr);
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
