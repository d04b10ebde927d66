// One token against a few row blocks at once, whatever their statistics. Internal linkage (see vec.h).
#pragma once
#include "cpu/outliers_avx512.h"
#include "cpu/planes.h"
#include "cpu/prefetch.h"
#include "cpu/store_avx512.h"
#include "cpu/unpack_half.h"

namespace hf_spqr {
namespace {

// Row blocks at once. Two share the broadcasts of activations, which limit short groups and 2-bit codes; the memory
// likes one better. More would not fit the registers.
template <int B, bool Sixteen>
constexpr int kAtOnce = Sixteen || B == 2 ? 2 : 1;

// Sums of R row blocks over the columns of a block of activations. Chains: 2 where a block is whole tiles, whose
// halves have sums of their own, because one alone would wait for itself.
template <int R, int Chains>
struct HalfSums {
    __m512i hi[R][Chains], lo[R][Chains];

    __attribute__((always_inline)) HalfSums() {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < Chains; ++c) hi[r][c] = lo[r][c] = _mm512_setzero_si512();
        }
    }

    // Half a tile. Stage by stage, for the sake of processors that do not look far ahead.
    template <int Half, int B>
    __attribute__((always_inline)) void add(const UnpackHalf<B>& unpack, const uint32_t* codes, int64_t words,
                                            const PlaneTile& x) {
        constexpr int kChain = Half % Chains;
        __m512i w[R][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) unpack.template get<Half>(codes + r * words, w[r]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512i h = _mm512_set1_epi32(x.hi[4 * Half + i]), l = _mm512_set1_epi32(x.lo[4 * Half + i]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                hi[r][kChain] = _mm512_dpbusd_epi32(hi[r][kChain], w[r][i], h);
                lo[r][kChain] = _mm512_dpbusd_epi32(lo[r][kChain], w[r][i], l);
            }
        }
    }

    // The integer product of row block r.
    __attribute__((always_inline)) __m512 total(int r) const {
        __m512i h = hi[r][0], l = lo[r][0];
        for (int c = 1; c < Chains; ++c) h = _mm512_add_epi32(h, hi[r][c]), l = _mm512_add_epi32(l, lo[r][c]);
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 8), l));
    }
};

// Scales and shifts of R row blocks for one group and block of activations: y += scale * (integer product + shift).
template <int R>
struct GroupScales {
    __m512 scale[R], shift[R];

    template <class Statistics>
    __attribute__((always_inline)) GroupScales(const Statistics* statistics, int group, const float* numbers) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) statistics[r].get(group, numbers, scale[r], shift[r]);
    }

    template <int Chains>
    __attribute__((always_inline)) void apply(const HalfSums<R, Chains>& sums, __m512* y) const {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            y[r] = _mm512_fmadd_ps(scale[r], _mm512_add_ps(sums.total(r), shift[r]), y[r]);
        }
    }
};

// R row blocks. Statistics: those of a panel, with load(matrix, statistics, groups, numbers of the panel's blocks of
// activations) and get(group, numbers of the block, scale, shift). Sixteen: groups of 16, else of 32 and more.
template <class Statistics, int B, bool Sixteen, int R>
void row_blocks(const LinearArgs& a, int64_t first_block) {
    const Matrix& m = a.weight;
    const Planes planes(m, a.planes);
    const UnpackHalf<B> unpack;
    const int tiles = Sixteen ? 1 : plane_block(m) / kColumns;  // of a block of activations
    const int group_step = m.group == kPerChannel ? 0 : 1;      // a row's only group serves all its blocks
    Statistics statistics[R];
    __m512 y[R];
    for (int r = 0; r < R; ++r) y[r] = _mm512_setzero_ps();
    OutlierPass<R> outliers(m, first_block, a.x);
    Ahead<R> ahead(m, first_block);
    const float* numbers = planes.quad(0);
    for (PanelWalk walk(m, first_block); walk.next();) {
        const Panel& panel = walk.panel;
        ahead.lines((panel.tiles - panel.statistics) / kRows);
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups, numbers);
        int group = 0;
        for (int64_t tile = 0; tile < panel.count; tile += tiles) {
            const PlaneTile* x = planes.tile(panel.first_tile + tile);
            const uint32_t* codes = panel.tiles + tile * B * kRows;
            const int64_t here = panel.count - tile < tiles ? panel.count - tile : tiles;
            if constexpr (Sixteen) {
                ahead.template lines<B>();
                outliers.tile();
                const GroupScales<R> first(statistics, group, numbers);
                HalfSums<R, 1> sums;
                sums.template add<0>(unpack, codes, m.words, *x);
                first.apply(sums, y);
                const GroupScales<R> second(statistics, group + 1, numbers + 4);
                sums = {};
                sums.template add<1>(unpack, codes, m.words, *x);
                second.apply(sums, y);
                group += 2;
                numbers += 8;
            } else {
                HalfSums<R, 2> sums;
                for (int64_t t = 0; t < here; ++t) {
                    ahead.template lines<B>();
                    outliers.tile();
                    sums.template add<0>(unpack, codes + t * B * kRows, m.words, x[t]);
                    sums.template add<1>(unpack, codes + t * B * kRows, m.words, x[t]);
                }
                GroupScales<R>(statistics, group, numbers).apply(sums, y);
                group += group_step;
                numbers += 4;
            }
        }
    }
    outliers.add(y);
    for (int r = 0; r < R; ++r) store_block(a, 0, first_block + r, y[r]);
}

// Row blocks [first, last).
template <class Statistics, int B, bool Sixteen>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    constexpr int kBlocks = kAtOnce<B, Sixteen>;
    int64_t block = first;
    for (; block + kBlocks <= last; block += kBlocks) row_blocks<Statistics, B, Sixteen, kBlocks>(a, block);
    for (; block < last; ++block) row_blocks<Statistics, B, Sixteen, 1>(a, block);
}

template <class Statistics, int B>
void one_token(const LinearArgs& a, int64_t first, int64_t last) {
    if (a.weight.group == 16) {
        all_row_blocks<Statistics, B, true>(a, first, last);
    } else {
        all_row_blocks<Statistics, B, false>(a, first, last);
    }
}

}  // namespace
}  // namespace hf_spqr
