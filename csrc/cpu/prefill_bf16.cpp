// Many bf16 tokens of a matrix with short groups, whose scales would have to be applied too often: tiles become bf16
// weights and are multiplied by all tokens. The accuracy is that of a bf16 matrix product.
#include <immintrin.h>
#include "cpu/bf16.h"
#include "cpu/halves.h"
#include "cpu/multiply_bf16.h"
#include "cpu/outliers_bf16.h"
#include "cpu/prefetch.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/vec.h"
#include "cpu/weights_bf16.h"

namespace hf_spqr {
namespace {

template <int B, int R>
void row_blocks(const LinearArgs& a, int64_t row_block) {
    alignas(64) static constexpr float kOnes[kRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    alignas(64) static constexpr float kZeros[kMaxTokens] = {};
    const Matrix& m = a.weight;
    const Halves halves(m, a.tokens, a.planes);
    const __m512i order = pair_order();
    const int group_shift = group_shift_in_tile(m);
    const int64_t ahead = pass_bytes(m, R);
    alignas(64) float y[kMaxTokens][R][kRows];
    memset(y, 0, a.tokens * sizeof y[0]);
    Codes<R> weights;
    PanelScales statistics[R];
    Values<B> values;
    OutlierPrefetch outliers(m, row_block, R);
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        outliers.panel();
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups);
        for (int64_t tile = 0; tile < panel.count; tile += kTiles) {
            const int here = panel.count - tile < kTiles ? int(panel.count - tile) : kTiles;
            Part<R> part;
            for (int r = 0; r < R; ++r) {
                const uint32_t* packed = panel.tiles + r * m.words + tile * B * kRows;
                prefetch_lines(reinterpret_cast<const char*>(packed) + ahead, here * B);
                for (int i = 0; i < here; ++i) {
                    const int group = group_of_tile(m, tile + i) * kRows;
                    values.load(packed + i * B * kRows);
                    pairs_from<B, 0>(values, statistics[r].scale + group, statistics[r].zero + group, group_shift,
                                     order, reinterpret_cast<char*>(weights.pair[i * kPairs][r]),
                                     sizeof weights.pair[0]);
                }
                part.scale[r] = kOnes;
                part.zero[r] = kZeros;
            }
            part.codes = weights.pair;
            part.blocks = 1;
            part.tiles = here;
            part.group_stride = 0;
            part.x = halves.tile(panel.first_tile + tile);
            part.minus_sum = kZeros;
            part.tokens = a.tokens;
            multiply_all<R, kPairs>(part, y);
        }
    }
    for (int r = 0; r < R; ++r) {
        add_outliers(m, row_block + r, halves, y[0][r], R * kRows);
        for (int t = 0; t < a.tokens; ++t) store_block(a, t, row_block + r, _mm512_load_ps(y[t][r]));
    }
}

template <int B>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    constexpr int kAtOnce = 4;
    int64_t block = first;
    for (; block + kAtOnce <= last; block += kAtOnce) row_blocks<B, kAtOnce>(a, block);
    for (; block < last; ++block) row_blocks<B, 1>(a, block);
}

}  // namespace

bool has_prefill_bf16(const Matrix& m) {
    return m.bits >= 2 && m.bits <= 4 && (m.group == 8 || m.group == 16);
}

void prefill_bf16(const LinearArgs& a, int64_t first, int64_t last) {
    switch (a.weight.bits) {
        case 2:
            return all_row_blocks<2>(a, first, last);
        case 3:
            return all_row_blocks<3>(a, first, last);
        default:
            return all_row_blocks<4>(a, first, last);
    }
}

}  // namespace hf_spqr
