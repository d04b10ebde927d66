// Every format, 1 to kMaxTokens tokens: a tile is unpacked once and multiplied by all tokens.
#include "cpu/kernels.h"
#include "cpu/outliers_avx512.h"
#include "cpu/planes.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/unpack_vbmi.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

constexpr int64_t kAhead = 2048;  // bytes to prefetch ahead

// Unpacks any width, through memory: worth it when several tokens share the result.
struct UnpackAny {
    using Function = void (*)(const uint32_t*, __m512i*);
    Function function;

    template <int B>
    static void unpack(const uint32_t* tile, __m512i* w) {
        static const Unpack<B> kUnpack;
        kUnpack(tile, w);
    }
    explicit UnpackAny(int bits) {
        constexpr Function kTable[8] = {unpack<1>, unpack<2>, unpack<3>, unpack<4>,
                                        unpack<5>, unpack<6>, unpack<7>, unpack<8>};
        function = kTable[bits - 1];
    }
    void operator()(const uint32_t* tile, __m512i* w) const { function(tile, w); }
};

struct Token {
    const int32_t *hi, *lo;
    const float *scale, *quads;
};

// sum[t] += scale * (xs dot - zero X) over the tiles of one block of activations, for T tokens. Several blocks share
// a tile (PerTile 4, 2), or a block covers `tiles` tiles (PerTile 1).
template <int PerTile, int T>
__attribute__((always_inline)) inline void multiply(const __m512i* w, int tiles, const Token* tokens, int64_t word,
                                                    int64_t block, const float* scale, const float* zero,
                                                    __m512* sum) {
    constexpr int kCount = 8 / PerTile;
#pragma GCC unroll 4
    for (int i = 0; i < PerTile; ++i) {
        const __m512 s = _mm512_load_ps(scale + i * kRows), z = _mm512_load_ps(zero + i * kRows);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const Token& x = tokens[t];
            __m512i d = dot<kCount>(w + i * kCount, x.hi + word + i * kCount, x.lo + word + i * kCount);
            for (int j = 1; j < tiles; ++j) {
                d = _mm512_add_epi32(d, dot<kCount>(w + 8 * j, x.hi + word + 8 * j, x.lo + word + 8 * j));
            }
            __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(d), _mm512_set1_ps(x.scale[block + i]));
            f = _mm512_fnmadd_ps(z, _mm512_set1_ps(x.quads[4 * (block + i) + 2]), f);
            sum[t] = _mm512_fmadd_ps(s, f, sum[t]);
        }
    }
}

template <class UnpackTile, int PerTile>
void row_block(const LinearArgs& a, const UnpackTile& unpack, const Token* tokens, int64_t row_block, __m512* sum) {
    constexpr int kMaxTiles = 4;  // of a block of activations
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
            const int64_t word = (panel.first_tile + tile) * 8;
            const float *scale = statistics.scale + group * kRows, *zero = statistics.zero + group * kRows;
            int t = 0;
            for (; t + 4 <= a.tokens; t += 4) {
                multiply<PerTile, 4>(w, here, tokens + t, word, block, scale, zero, sum + t);
            }
            for (; t < a.tokens; ++t) {
                multiply<PerTile, 1>(w, here, tokens + t, word, block, scale, zero, sum + t);
            }
            if (!per_channel) group += PerTile;
        }
    }
}

template <class UnpackTile, int PerTile>
void row_blocks(const LinearArgs& a, const UnpackTile& unpack, int64_t first, int64_t last) {
    const Planes planes(a.weight);
    Token tokens[kMaxTokens];
    __m512 sum[kMaxTokens];
    for (int t = 0; t < a.tokens; ++t) {
        const char* p = a.planes + t * a.planes_stride;
        tokens[t] = {reinterpret_cast<const int32_t*>(planes.hi(p)), reinterpret_cast<const int32_t*>(planes.lo(p)),
                     planes.scale(p), planes.quads(p)};
    }
    for (int64_t block = first; block < last; ++block) {
        row_block<UnpackTile, PerTile>(a, unpack, tokens, block, sum);
        add_outliers(a.weight, block, a.x, a.x_stride, a.tokens, sum);
        for (int t = 0; t < a.tokens; ++t) store_block(a, t, block, sum[t]);
    }
}

template <class UnpackTile>
void by_group(const LinearArgs& a, const UnpackTile& unpack, int64_t first, int64_t last) {
    if (a.weight.group == 8) {
        row_blocks<UnpackTile, 4>(a, unpack, first, last);
    } else if (a.weight.group == 16) {
        row_blocks<UnpackTile, 2>(a, unpack, first, last);
    } else {
        row_blocks<UnpackTile, 1>(a, unpack, first, last);
    }
}

}  // namespace

void batch_vnni(const LinearArgs& a, int64_t first, int64_t last) {
    switch (a.tokens == 1 ? a.weight.bits : 0) {  // one token: in registers, for the widths in common use
        case 2:
            return by_group(a, Unpack<2>(), first, last);
        case 3:
            return by_group(a, Unpack<3>(), first, last);
        case 4:
            return by_group(a, Unpack<4>(), first, last);
        case 8:
            return by_group(a, Unpack<8>(), first, last);
        default:
            return by_group(a, UnpackAny(a.weight.bits), first, last);
    }
}

}  // namespace hf_spqr
