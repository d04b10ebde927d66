// Every format, 1 to kMaxTokens tokens: a tile is unpacked once and multiplied by all tokens.
#include "cpu/kernels.h"
#include "cpu/outliers_avx512.h"
#include "cpu/outliers_tokens.h"
#include "cpu/planes.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/unpack_vbmi.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

constexpr int64_t kAhead = 2048;  // bytes to prefetch ahead

using UnpackTile = void (*)(const uint32_t*, __m512i*);

// Through memory, which is worth it when several tokens share the result.
template <int B>
void unpack_tile(const uint32_t* tile, __m512i* w) {
    static const Unpack<B> kUnpack;
    kUnpack(tile, w);
}

UnpackTile unpack_tile_of(int bits) {
    constexpr UnpackTile kTable[8] = {unpack_tile<1>, unpack_tile<2>, unpack_tile<3>, unpack_tile<4>,
                                      unpack_tile<5>, unpack_tile<6>, unpack_tile<7>, unpack_tile<8>};
    return kTable[bits - 1];
}

// sum[t] += scale * (xs dot - zero X) over the blocks of activations in one tile, for T tokens.
template <int PerTile, int T>
__attribute__((always_inline)) inline void multiply(const __m512i* w, const PlaneTile* x, const Planes& planes,
                                                    int64_t block, int64_t token, const float* scale,
                                                    const float* zero, __m512* sum) {
    constexpr int kCount = 8 / PerTile;
#pragma GCC unroll 4
    for (int i = 0; i < PerTile; ++i) {
        const __m512 s = _mm512_load_ps(scale + i * kRows), z = _mm512_load_ps(zero + i * kRows);
        const BlockNumbers* n = planes.block(block + i) + token;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const __m512i d = dot<kCount>(w + i * kCount, x[token + t].hi + i * kCount, x[token + t].lo + i * kCount);
            __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(d), _mm512_set1_ps(n[t].scale));
            f = _mm512_fnmadd_ps(z, _mm512_set1_ps(n[t].sum), f);
            sum[t] = _mm512_fmadd_ps(s, f, sum[t]);
        }
    }
}

// The same for a block of several tiles.
template <int T>
__attribute__((always_inline)) inline void multiply_tiles(const __m512i* w, int tiles, const PlaneTile* x,
                                                          const Planes& planes, int64_t block, int64_t token,
                                                          const float* scale, const float* zero, __m512* sum) {
    const __m512 s = _mm512_load_ps(scale), z = _mm512_load_ps(zero);
    const BlockNumbers* n = planes.block(block) + token;
    __m512i d[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) d[t] = _mm512_setzero_si512();
    for (int j = 0; j < tiles; ++j, w += 8, x += planes.tokens) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) d[t] = _mm512_add_epi32(d[t], dot<8>(w, x[token + t].hi, x[token + t].lo));
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(d[t]), _mm512_set1_ps(n[t].scale));
        f = _mm512_fnmadd_ps(z, _mm512_set1_ps(n[t].sum), f);
        sum[t] = _mm512_fmadd_ps(s, f, sum[t]);
    }
}

template <int PerTile>
void row_block(const LinearArgs& a, const Planes& planes, int64_t row_block, __m512* sum) {
    const UnpackTile unpack = unpack_tile_of(a.weight.bits);
    constexpr int kMaxTiles = PerTile == 1 ? 4 : 1;  // of a block of activations
    const Matrix& m = a.weight;
    const int tiles = PerTile == 1 ? plane_block(m) / kColumns : 1;
    const bool per_channel = m.group == kPerChannel;
    PanelScales statistics;
    __m512i w[8 * kMaxTiles];
    for (int t = 0; t < a.tokens; ++t) sum[t] = _mm512_setzero_ps();
    int64_t block = 0;  // of activations
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        statistics.load(m, panel.statistics, panel.groups);
        int group = 0;
        for (int64_t tile = 0; tile < panel.count; tile += tiles, block += PerTile) {
            const int here = panel.count - tile < tiles ? int(panel.count - tile) : tiles;
            const uint32_t* codes = panel.tiles + tile * m.bits * kRows;
            for (int i = 0; i < here * m.bits; ++i) {
                _mm_prefetch(reinterpret_cast<const char*>(codes + i * kRows) + kAhead, _MM_HINT_T0);
            }
            for (int j = 0; j < here; ++j) unpack(codes + j * m.bits * kRows, w + 8 * j);
            const PlaneTile* x = planes.tile(panel.first_tile + tile);
            const float *scale = statistics.scale + group * kRows, *zero = statistics.zero + group * kRows;
            int t = 0;
            if constexpr (PerTile == 1) {
                for (; t + 4 <= a.tokens; t += 4) {
                    multiply_tiles<4>(w, here, x, planes, block, t, scale, zero, sum + t);
                }
                for (; t < a.tokens; ++t) multiply_tiles<1>(w, here, x, planes, block, t, scale, zero, sum + t);
            } else {
                for (; t + 4 <= a.tokens; t += 4) {
                    multiply<PerTile, 4>(w, x, planes, block, t, scale, zero, sum + t);
                }
                for (; t < a.tokens; ++t) multiply<PerTile, 1>(w, x, planes, block, t, scale, zero, sum + t);
            }
            if (!per_channel) group += PerTile;
        }
    }
}

template <int PerTile>
void row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    const Planes planes(a.weight, a.tokens, a.planes);
    __m512 sum[kMaxTokens];
    for (int64_t block = first; block < last; ++block) {
        row_block<PerTile>(a, planes, block, sum);
        if (a.tokens == 1) {
            sum[0] = add_outliers(a.weight, block, a.x, sum[0]);
        } else {
            float* y = reinterpret_cast<float*>(sum);
            add_outliers(a.weight, block, planes.column(0), planes.padded_tokens, a.tokens, y, kRows);
        }
        for (int t = 0; t < a.tokens; ++t) store_block(a, t, block, sum[t]);
    }
}

}  // namespace

void batch_vnni(const LinearArgs& a, int64_t first, int64_t last) {
    if (a.weight.group == 8) {
        row_blocks<4>(a, first, last);
    } else if (a.weight.group == 16) {
        row_blocks<2>(a, first, last);
    } else {
        row_blocks<1>(a, first, last);
    }
}

}  // namespace hf_spqr
