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

// The outliers of a row block that lie in one stretch after the other.
struct StretchOutliers {
    int32_t next[kRows], end[kRows];
    int rows;
    uint32_t found[kRows * kTiles * kColumns + 16];  // fp16 value << 16 | row << 8 | column of the stretch

    void start(const Matrix& m, int64_t row_block) {
        const int64_t row = row_block * kRows;
        rows = m.rows - row < kRows ? int(m.rows - row) : kRows;
        for (int r = 0; r < rows; ++r) {
            next[r] = m.outlier_row[row + r];
            end[r] = m.outlier_row[row + r + 1];
        }
    }

    // Sixteen entries from `i` on, `count` of which exist: their columns, and their values in the upper half-words.
    static void load(const Matrix& m, int64_t i, int count, __m512i* column, __m512i* value) {
        const __m512i high = _mm512_set1_epi32(int(0xffff0000));
        const __mmask16 some = count < 16 ? __mmask16((1 << count) - 1) : __mmask16(0xffff);
        if (m.outlier) {
            const __m512i entry = _mm512_maskz_loadu_epi32(some, m.outlier + i);
            *column = _mm512_andnot_si512(high, entry);
            *value = _mm512_and_si512(high, entry);
        } else {
            const __m512i a = _mm512_maskz_loadu_epi64(__mmask8(some), m.outlier_wide + i);
            const __m512i b = _mm512_maskz_loadu_epi64(__mmask8(some >> 8), m.outlier_wide + i + 8);
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            *column = _mm512_permutex2var_epi32(a, even, b);
            *value = _mm512_slli_epi32(_mm512_permutex2var_epi32(a, odd, b), 16);
        }
    }

    // Fills `found` with those in columns [first, first + width), without a branch on how many a row has of them.
    int find(const Matrix& m, int64_t first, int64_t width) {
        const __m512i begin = _mm512_set1_epi32(int(first)), columns = _mm512_set1_epi32(int(width));
        int count = 0;
        for (int r = 0; r < rows; ++r) {
            int here;
            do {
                const int left = end[r] - next[r] < 16 ? end[r] - next[r] : 16;
                __m512i column, value;
                load(m, next[r], left, &column, &value);
                column = _mm512_sub_epi32(column, begin);
                const __mmask16 within = _mm512_cmplt_epu32_mask(column, columns);
                here = __builtin_popcount(within & ((1 << left) - 1));
                const __m512i place = _mm512_or_si512(column, _mm512_set1_epi32(r << 8));
                _mm512_storeu_si512(found + count, _mm512_or_si512(place, value));
                count += here;
                next[r] += here;
            } while (here == 16);
        }
        return count;
    }
};

// The codes of 16 places of a stretch.
template <int B>
__m512i codes_at(const uint32_t* tiles, __m512i row, __m512i column) {
    const __m512i pair = _mm512_and_si512(_mm512_srli_epi32(column, 1), _mm512_set1_epi32(15));
    const __m512i side = _mm512_slli_epi32(_mm512_and_si512(column, _mm512_set1_epi32(1)), 4);
    const __m512i tile = _mm512_mullo_epi32(_mm512_srli_epi32(column, 5), _mm512_set1_epi32(B));
    const __m512i mask = _mm512_set1_epi32((1 << B) - 1);
    const __mmask16 spare = B == 3 ? _mm512_cmpeq_epi32_mask(pair, _mm512_set1_epi32(15)) : __mmask16(0);
    __m512i vector, shift;
    if constexpr (B == 3) {
        vector = _mm512_maskz_permutexvar_epi32(__mmask16(~spare), pair, _mm512_loadu_si512(kVector3));
        shift = _mm512_permutexvar_epi32(pair, _mm512_loadu_si512(kShift3));
    } else {
        constexpr int kPerHalf = 16 / B;  // 4 or 8
        vector = _mm512_srli_epi32(pair, kPerHalf == 8 ? 3 : 2);
        shift = _mm512_mullo_epi32(_mm512_and_si512(pair, _mm512_set1_epi32(kPerHalf - 1)), _mm512_set1_epi32(B));
    }
    shift = _mm512_add_epi32(shift, side);
    const __m512i at = _mm512_add_epi32(_mm512_slli_epi32(_mm512_add_epi32(tile, vector), 4), row);
    __m512i code = _mm512_and_si512(_mm512_srlv_epi32(_mm512_i32gather_epi32(at, tiles, 4), shift), mask);
    if (spare) {  // pair 15: a bit of each vector
        __m512i bits = _mm512_setzero_si512();
        for (int i = 0; i < 3; ++i) {
            const __m512i word = _mm512_mask_i32gather_epi32(bits, spare, at, tiles + i * kRows, 4);
            const __m512i bit = _mm512_srlv_epi32(word, _mm512_add_epi32(side, _mm512_set1_epi32(15 - i)));
            bits = _mm512_or_si512(bits, _mm512_and_si512(bit, _mm512_set1_epi32(1 << i)));
        }
        code = _mm512_mask_mov_epi32(code, spare, bits);
    }
    return code;
}

// Puts them into the weights of `count` tiles.
template <int B, int R>
void put_outliers(const Matrix& m, StretchOutliers& outliers, const uint32_t* tiles, int64_t first_column, int count,
                  const float* scale, const float* zero, uint32_t (*weights)[R][kRows]) {
    const int found = outliers.find(m, first_column, count * kColumns);
    const int group_shift = m.group == kPerChannel ? 31 : __builtin_ctz(m.group);
    uint16_t* const out = reinterpret_cast<uint16_t*>(weights);
    for (int i = 0; i < found; i += 16) {
        const int here = found - i < 16 ? found - i : 16;
        const __m512i entry = _mm512_maskz_loadu_epi32(__mmask16((1 << here) - 1), outliers.found + i);
        const __m512i column = _mm512_and_si512(entry, _mm512_set1_epi32(0xff));
        const __m512i row = _mm512_and_si512(_mm512_srli_epi32(entry, 8), _mm512_set1_epi32(0xff));
        const __m512i group = _mm512_srl_epi32(column, _mm_cvtsi32_si128(group_shift));
        const __m512i at = _mm512_add_epi32(_mm512_slli_epi32(group, 4), row);
        const __m512 q = _mm512_cvtepi32_ps(codes_at<B>(tiles, row, column));
        const __m512 dense = _mm512_mul_ps(_mm512_sub_ps(q, _mm512_i32gather_ps(at, zero, 4)),
                                           _mm512_i32gather_ps(at, scale, 4));
        const __m512 value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(entry, 16)));
        alignas(64) uint16_t weight[16];
        alignas(64) uint32_t place[16];  // in half-words: pair, row, side
        _mm256_store_si256(reinterpret_cast<__m256i*>(weight), (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(dense, value)));
        const __m512i word = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_srli_epi32(column, 1), _mm512_set1_epi32(R * kRows)), row);
        _mm512_store_si512(place, _mm512_or_si512(_mm512_slli_epi32(word, 1), _mm512_and_si512(column, _mm512_set1_epi32(1))));
        for (int e = 0; e < here; ++e) out[place[e]] = weight[e];
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
    OutlierPrefetch next_outliers(m, row_block + R, R);  // those of this pass were fetched during the one before
    StretchOutliers outliers[R];
    for (int r = 0; m.outlier_row && r < R; ++r) outliers[r].start(m, row_block + r);
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        next_outliers.panel();
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
                    const int group = group_of_tile(m, tile) * kRows;
                    put_outliers<B>(m, outliers[r], packed, (panel.first_tile + tile) * kColumns, here,
                                    statistics[r].scale + group, statistics[r].zero + group,
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
