// One to four tokens against a few row blocks at once, whatever their statistics. Internal linkage (see vec.h).
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

// Sums of R row blocks and T tokens over the columns of a block of activations. Chains: 2 where a block is whole tiles
// of one token, whose halves have sums of their own, because one alone would wait for itself.
template <int R, int T, int Chains>
struct HalfSums {
    __m512i hi[T][R][Chains], lo[T][R][Chains];

    __attribute__((always_inline)) HalfSums() {
        for (int t = 0; t < T; ++t) {
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < Chains; ++c) hi[t][r][c] = lo[t][r][c] = _mm512_setzero_si512();
            }
        }
    }

    // Half a tile. x: of T tokens. Stage by stage, for the sake of processors that do not look far ahead.
    template <int Half, int B>
    __attribute__((always_inline)) void add(const UnpackHalf<B>& unpack, const uint32_t* codes, int64_t words,
                                            const PlaneTile* x) {
        constexpr int kChain = Half % Chains;
        __m512i w[R][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) unpack.template get<Half>(codes + r * words, w[r]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const __m512i h = _mm512_set1_epi32(x[t].hi[4 * Half + i]),
                              l = _mm512_set1_epi32(x[t].lo[4 * Half + i]);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    hi[t][r][kChain] = _mm512_dpbusd_epi32(hi[t][r][kChain], w[r][i], h);
                    lo[t][r][kChain] = _mm512_dpbusd_epi32(lo[t][r][kChain], w[r][i], l);
                }
            }
        }
    }

    // The integer product of token t and row block r.
    __attribute__((always_inline)) __m512 total(int t, int r) const {
        __m512i h = hi[t][r][0], l = lo[t][r][0];
        for (int c = 1; c < Chains; ++c) h = _mm512_add_epi32(h, hi[t][r][c]), l = _mm512_add_epi32(l, lo[t][r][c]);
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 8), l));
    }
};

// Scales and shifts of R row blocks for one group and block of activations. One token has its scale and its sum
// multiplied in; several have theirs applied to each product, where the shift is minus the zero point.
template <int R, int T>
struct GroupScales {
    __m512 scale[R], shift[R];

    template <class Statistics>
    __attribute__((always_inline)) GroupScales(const Statistics* statistics, int group, const float* numbers) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) statistics[r].get(group, numbers, scale[r], shift[r]);
    }

    // numbers: of T tokens.
    template <int Chains>
    __attribute__((always_inline)) void apply(const HalfSums<R, T, Chains>& sums, const float* numbers,
                                              __m512 (*y)[R]) const {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                __m512 product = sums.total(t, r);
                if constexpr (T == 1) {
                    product = _mm512_add_ps(product, shift[r]);
                } else {
                    product = _mm512_fmadd_ps(shift[r], _mm512_set1_ps(numbers[4 * t + 2]), product);
                    product = _mm512_mul_ps(product, _mm512_set1_ps(numbers[4 * t]));
                }
                y[t][r] = _mm512_fmadd_ps(scale[r], product, y[t][r]);
            }
        }
    }
};

// What stands in for a token's numbers in statistics that are the same for all tokens.
struct Ones {
    alignas(64) float number[64];
    constexpr Ones() : number() {
        for (float& n : number) n = 1.f;
    }
};

// R row blocks, and a share of T tokens, whose outliers are multiplied by x. Statistics: those of a panel, with
// load(matrix, statistics, groups, numbers of the panel's blocks of activations) and get(group, numbers of the block,
// scale, shift). Sixteen: groups of 16, else of 32 and more.
template <class Statistics, int B, bool Sixteen, int R, int T>
void multiply_share(const LinearArgs& a, int64_t first_block, const Planes& planes, const float* x, int64_t token) {
    alignas(64) static constexpr Ones kOnes;
    const Matrix& m = a.weight;
    const UnpackHalf<B> unpack;
    const int tiles = Sixteen ? 1 : plane_block(m) / kColumns;  // of a block of activations
    const int group_step = m.group == kPerChannel ? 0 : 1;      // a row's only group serves all its blocks
    Statistics statistics[R];
    __m512 y[T][R];
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) y[t][r] = _mm512_setzero_ps();
    }
    OutlierPass<R, T> outliers(m, first_block, x);
    Ahead<R> ahead(m, first_block);
    const float* numbers = planes.quad(0);
    const auto of_group = [&] { return T == 1 ? numbers : kOnes.number; };
    for (PanelWalk walk(m, first_block); walk.next();) {
        const Panel& panel = walk.panel;
        ahead.lines((panel.tiles - panel.statistics) / kRows);
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups, of_group());
        int group = 0;
        for (int64_t tile = 0; tile < panel.count; tile += tiles) {
            const PlaneTile* of_tile = planes.tile(panel.first_tile + tile);
            const uint32_t* codes = panel.tiles + tile * B * kRows;
            const int64_t here = panel.count - tile < tiles ? panel.count - tile : tiles;
            if constexpr (Sixteen) {
                ahead.template lines<B>();
                outliers.tile();
                const GroupScales<R, T> first(statistics, group, of_group());
                HalfSums<R, T, 1> sums;
                sums.template add<0>(unpack, codes, m.words, of_tile);
                first.apply(sums, numbers, y);
                numbers += 4 * T;
                const GroupScales<R, T> second(statistics, group + 1, of_group());
                sums = {};
                sums.template add<1>(unpack, codes, m.words, of_tile);
                second.apply(sums, numbers, y);
                numbers += 4 * T;
                group += 2;
            } else {
                HalfSums<R, T, T == 1 ? 2 : 1> sums;
                for (int64_t i = 0; i < here; ++i) {
                    ahead.template lines<B>();
                    outliers.tile();
                    sums.template add<0>(unpack, codes + i * B * kRows, m.words, of_tile + i * T);
                    sums.template add<1>(unpack, codes + i * B * kRows, m.words, of_tile + i * T);
                }
                GroupScales<R, T>(statistics, group, of_group()).apply(sums, numbers, y);
                numbers += 4 * T;
                group += group_step;
            }
        }
    }
    outliers.add(y);
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) store_block(a, token + t, first_block + r, y[t][r]);
    }
}

// Several tokens, share by share.
template <class Statistics, int B, bool Sixteen, int R>
void multiply_shares(const LinearArgs& a, int64_t first_block) {
    static_assert(kMostTogether == 4);
    constexpr auto kTwo = multiply_share<Statistics, B, Sixteen, R, 2>,
                   kThree = multiply_share<Statistics, B, Sixteen, R, 3>,
                   kFour = multiply_share<Statistics, B, Sixteen, R, 4>;
    const FewTokens few(a.weight, a.tokens, a.planes);
    for (int share = 0; share < few.shares; ++share) {
        const Planes planes = few.planes(share);
        const auto run = planes.tokens == 2 ? kTwo : planes.tokens == 3 ? kThree : kFour;
        run(a, first_block, planes, few.columns(share), few.begin(share));
    }
}

template <class Statistics, int B, bool Sixteen, int R>
void row_blocks(const LinearArgs& a, int64_t first_block) {
    if (a.tokens > 1) return multiply_shares<Statistics, B, Sixteen, R>(a, first_block);
    multiply_share<Statistics, B, Sixteen, R, 1>(a, first_block, Planes(a.weight, a.planes), a.x, 0);
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
void few_tokens(const LinearArgs& a, int64_t first, int64_t last) {
    if (a.weight.group == 16) {
        all_row_blocks<Statistics, B, true>(a, first, last);
    } else {
        all_row_blocks<Statistics, B, false>(a, first, last);
    }
}

}  // namespace
}  // namespace hf_spqr
