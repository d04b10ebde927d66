// Several bf16 tokens where rounds_weights: tiles become bf16 weights and are multiplied by all tokens. The accuracy
// is that of a bf16 matrix product.
#include <immintrin.h>
#include "cpu/bf16.h"
#include "cpu/halves.h"
#include "cpu/multiply_weights_bf16.h"
#include "cpu/prefetch.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/stretch_outliers_bf16.h"

namespace hf_spqr {
namespace {

// Quads [First, End) of a tile, Quads of which have a table.
template <int B, int Quads, int First, int End, int Stride>
__attribute__((always_inline)) inline void decode(const TileWeights<B>& values, const GroupTable<B>* tables,
                                                  uint32_t* out) {
    if constexpr (First < End) {
        __m512i side[kSides];
        values.template get<First>(tables[First / Quads], side);
        _mm512_store_si512(out, side[0]);
        _mm512_store_si512(out + kRows, side[1]);
        decode<B, Quads, First + 1, End, Stride>(values, tables, out + Stride * kRows);
    }
}

// Some tiles of a row block become weights, and are multiplied by T tokens, the first share. Half a tile is decoded
// while the half before is multiplied, which takes other parts of the processor.
template <int B, int Quads, int Stride, int T>
void first_share(const Matrix& m, const uint32_t* packed, const GroupTable<B>* tables, int64_t first, int tiles,
                 const uint32_t* x, float* y, int64_t y_stride, uint32_t* out) {
    constexpr int kHalf = kQuads / 2, kHalfWords = kHalf * Stride * kRows;
    TileWeights<B> values;
    __m512 sum[T > 0 ? T : 1][kSides];
    clear_sums<T>(sum);
    for (int i = 0;; ++i, x += T * kPairs, out += 2 * kHalfWords) {
        const GroupTable<B>* of_tile = tables + group_of_tile(m, first + i) - group_of_tile(m, first);
        if (i < tiles) {
            values.load(packed + i * B * kRows);
            decode<B, Quads, 0, kHalf, Stride>(values, of_tile, out);
        }
        if (i > 0) add_quads<kHalf, T, kSides, Stride>(out - kHalfWords, x - T * kPairs + kPairs / 2, sum);
        if (i == tiles) break;
        prefetch_tokens<T>(x + tiles * T * kPairs);
        decode<B, Quads, kHalf, kQuads, Stride>(values, of_tile, out + kHalfWords);
        add_quads<kHalf, T, kSides, Stride>(out, x, sum);
    }
    add_sums<T>(sum, y, y_stride);
}

// Adds the outliers of a stretch to its weights.
template <int R>
__attribute__((noinline)) void put_outliers(const Matrix& m, StretchOutliers& outliers, int64_t first_column,
                                            int64_t columns, uint32_t* weights) {
    FoundOutliers<Weights<R>::kVectors> found;
    found.find(m, outliers, first_column, columns);
    found.add_to(weights);
}

template <int B, int Quads, int R>
void row_blocks(const LinearArgs& a, int64_t row_block) {
    const Matrix& m = a.weight;
    const Halves halves(m, a.tokens, a.planes);
    const bool apart = outliers_apart(m, a.tokens), in_place = m.outlier_row && !apart;
    const int64_t ahead = pass_bytes(m, R);
    alignas(64) float y[kPromptTokens][R][kRows];
    memset(y, 0, a.tokens * sizeof y[0]);
    Weights<R> weights;
    GroupTable<B> tables[kTiles * kQuads / Quads];
    PanelScales statistics[R];
    constexpr int kStride = Weights<R>::kVectors;
    using Run = decltype(first_share<B, Quads, kStride, 0>)*;
    static_assert(kFewestOfFirst == 5 && kMostOfShare == 8);
    constexpr Run kFirst[] = {first_share<B, Quads, kStride, 5>, first_share<B, Quads, kStride, 6>,
                              first_share<B, Quads, kStride, 7>, first_share<B, Quads, kStride, 8>};
    const int64_t of_first = halves.shares.first;
    const Run run_first = of_first ? kFirst[of_first - kFewestOfFirst] : first_share<B, Quads, kStride, 0>;
    // Those added to weights were fetched during the pass before; those apart come after this one.
    OutlierPrefetch next_outliers(m, apart ? row_block : row_block + R, R);
    StretchOutliers outliers[R];
    for (int r = 0; in_place && r < R; ++r) outliers[r].start(m, row_block + r);
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        next_outliers.panel();
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups);
        for (int64_t tile = 0; tile < panel.count; tile += halves.stretch) {
            const int here = int(panel.count - tile < halves.stretch ? panel.count - tile : halves.stretch);
            const int64_t tile_of_row = panel.first_tile + tile;
            for (int r = 0; r < R; ++r) {
                const uint32_t* packed = panel.tiles + r * m.words + tile * B * kRows;
                prefetch_lines(reinterpret_cast<const char*>(packed) + ahead, here * B);
                const int group = group_of_tile(m, tile), end = group_of_tile(m, tile + here - 1) + kQuads / Quads;
                for (int g = group; g < end; ++g) {
                    tables[g - group].set(_mm512_load_ps(statistics[r].scale + g * kRows),
                                          _mm512_load_ps(statistics[r].zero + g * kRows));
                }
                run_first(m, packed, tables, tile, here, halves.share(tile_of_row, 0), y[0][r], R * kRows,
                          weights.of_block(r));
                if (in_place)
                    put_outliers<R>(m, outliers[r], tile_of_row * kColumns, here * kColumns, weights.of_block(r));
            }
            multiply_all(weights, tile_of_row, here, halves, y);
        }
    }
    for (int r = 0; r < R; ++r) {
        if (apart) add_outliers(m, row_block + r, halves, y[0][r], R * kRows);
        for (int t = 0; t < a.tokens; ++t) store_block(a, t, row_block + r, _mm512_load_ps(y[t][r]));
    }
}

template <int B, int Quads>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    constexpr int kAtOnce = 4;
    int64_t block = first;
    for (; block + kAtOnce <= last; block += kAtOnce) row_blocks<B, Quads, kAtOnce>(a, block);
    for (; block < last; ++block) row_blocks<B, Quads, 1>(a, block);
}

template <int B>
void by_group(const LinearArgs& a, int64_t first, int64_t last) {
    if (a.weight.group == 8) {
        all_row_blocks<B, 2>(a, first, last);
    } else if (a.weight.group == 16) {
        all_row_blocks<B, 4>(a, first, last);
    } else {
        all_row_blocks<B, 8>(a, first, last);
    }
}

}  // namespace

void prefill_bf16(const LinearArgs& a, int64_t first, int64_t last) {
    constexpr void (*kRun[3])(const LinearArgs&, int64_t, int64_t) = {by_group<2>, by_group<3>, by_group<4>};
    kRun[a.weight.bits - 2](a, first, last);
}

}  // namespace hf_spqr
