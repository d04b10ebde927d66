// Many bf16 tokens of a matrix with short groups, whose scales would have to be applied too often: tiles become bf16
// weights and are multiplied by all tokens. The accuracy is that of a bf16 matrix product.
#include <immintrin.h>
#include "cpu/bf16.h"
#include "cpu/halves.h"
#include "cpu/multiply_bf16.h"
#include "cpu/prefetch.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/vec.h"
#include "cpu/weights_bf16.h"

namespace hf_spqr {
namespace {

// Puts the outliers of a row block into the weights of tiles [tile, tile + count) of a panel. next: of each row.
template <int B, int R>
void put_outliers(const Matrix& m, const Panel& panel, int64_t tile, int count, const PanelScales& statistics,
                  int64_t row_block, int32_t* next, uint32_t (*weights)[R][kRows]) {
    const int64_t first = (panel.first_tile + tile) * kColumns, row = row_block * kRows;
    const int rows = m.rows - row < kRows ? int(m.rows - row) : kRows;
    const uint64_t width = count * kColumns;
    for (int r = 0; r < rows; ++r) {
        const int32_t end = m.outlier_row[row + r + 1];
        for (; next[r] < end; ++next[r]) {
            const Outlier outlier(m, next[r]);
            const uint64_t column = outlier.column - first;
            if (column >= width) break;
            const float w = weight_at<B>(m, panel, statistics, r, int(tile * kColumns + column)) + outlier.value;
            reinterpret_cast<uint16_t*>(&weights[column / 2][0][r])[column % 2] = to_bf16(w);
        }
    }
}

template <int B, int R>
void row_blocks(const LinearArgs& a, int64_t row_block) {
    const Matrix& m = a.weight;
    const Halves halves(m, a.tokens, a.planes);
    const __m512i order = pair_order();
    const int group_shift = group_shift_in_tile(m);
    const int64_t ahead = pass_bytes(m, R);
    alignas(64) float y[kPromptTokens][R][kRows];
    memset(y, 0, a.tokens * sizeof y[0]);
    Unpacked<R> weights;
    PanelScales statistics[R];
    Values<B> values;
    OutlierPrefetch outliers(m, row_block, R);
    int32_t next[R * kRows];
    for (int64_t r = 0; m.outlier_row && r < R * kRows && row_block * kRows + r < m.rows; ++r) {
        next[r] = m.outlier_row[row_block * kRows + r];
    }
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        outliers.panel();
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups);
        for (int64_t tile = 0; tile < panel.count; tile += halves.stretch) {
            const int here = int(panel.count - tile < halves.stretch ? panel.count - tile : halves.stretch);
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
                if (m.outlier_row) {
                    Panel of_block = panel;
                    of_block.tiles += r * m.words;
                    put_outliers<B>(m, of_block, tile, here, statistics[r], row_block + r, next + r * kRows,
                                    reinterpret_cast<uint32_t(*)[R][kRows]>(weights.pair[0][r]));
                }
            }
            multiply_all<R>(weights.pair, panel.first_tile + tile, here, halves, y);
        }
    }
    for (int t = 0; t < a.tokens; ++t) {
        for (int r = 0; r < R; ++r) store_block(a, t, row_block + r, _mm512_load_ps(y[t][r]));
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
