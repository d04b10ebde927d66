// Dense bf16 rows for a matrix product, with the processor's own rounding. Everything stays in registers from the
// packed words to the finished rows, which is why outliers are put in afterwards.
#include <immintrin.h>
#include "cpu/bf16.h"
#include "cpu/weights_bf16.h"
#include "cpu/panels.h"
#include "cpu/statistics_avx512.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace hf_spqr {
namespace {

// Recomputes in fp32 the weights of a panel that have outliers.
template <int B>
void put_outliers(const Matrix& m, const Panel& panel, const PanelScales& statistics, int64_t block, int rows,
                  int32_t* next, uint16_t* out, int64_t stride) {
    const int64_t first = panel.first_tile * kColumns;
    const uint64_t width = panel.count * kColumns;
    for (int r = 0; r < rows; ++r) {
        const int32_t end = m.outlier_row[block * kRows + r + 1];
        for (; next[r] < end; ++next[r]) {
            const int32_t i = next[r];
            const uint64_t entry = m.outlier ? m.outlier[i] : m.outlier_wide[i];
            const uint64_t column = (m.outlier ? entry & 0xffff : entry & 0xffffffff) - first;  // of the panel
            if (column >= width) break;
            const int group = m.group == kPerChannel ? 0 : int(column / m.group);
            const uint32_t q = code_at<B>(panel.tiles + column / kColumns * B * kRows + r, int(column % kColumns));
            const float s = statistics.scale[group * kRows + r], z = statistics.zero[group * kRows + r];
            const float value = from_f16(uint16_t(m.outlier ? entry >> 16 : entry >> 32));
            out[r * stride + first + column] = to_bf16((float(int(q)) - z) * s + value);
        }
    }
}

template <int B>
void dequantize_rows(const DequantizeArgs& a, int64_t first_block, int64_t last_block) {
    const Matrix& m = a.weight;
    const __m512i order = pair_order();
    const int group_shift = group_shift_in_tile(m);
    PanelScales statistics;
    Values<B> values;
    for (int64_t block = first_block; block < last_block; ++block) {
        uint16_t* const out = static_cast<uint16_t*>(a.out) + (block - first_block) * kRows * a.out_stride;
        const int rows = m.rows - block * kRows < kRows ? int(m.rows - block * kRows) : kRows;
        int32_t next[kRows];
        for (int r = 0; m.outlier_row && r < rows; ++r) next[r] = m.outlier_row[block * kRows + r];
        for (PanelWalk walk(m, block); walk.next();) {
            const Panel& panel = walk.panel;
            statistics.load(m, panel.statistics, panel.groups);
            for (int64_t tile = 0; tile < panel.count; ++tile) {
                alignas(64) uint32_t words[kRows][kRows];
                const int group = group_of_tile(m, tile);
                values.load(panel.tiles + tile * B * kRows);
                pairs_from<B, 0>(values, statistics.scale + group * kRows, statistics.zero + group * kRows,
                                 group_shift, order, reinterpret_cast<char*>(words), sizeof words[0]);
                const int64_t first = (panel.first_tile + tile) * kColumns;
                const int columns = m.columns - first < kColumns ? int(m.columns - first) : kColumns;
                if (rows == kRows && columns == kColumns) {
                    transpose(words[0], reinterpret_cast<char*>(out + first), a.out_stride * 2);
                    continue;
                }
                alignas(64) uint16_t part[kRows][kColumns];
                transpose(words[0], reinterpret_cast<char*>(part), sizeof part[0]);
                for (int r = 0; r < rows; ++r) memcpy(out + r * a.out_stride + first, part[r], columns * 2);
            }
            if (m.outlier_row) put_outliers<B>(m, panel, statistics, block, rows, next, out, a.out_stride);
        }
    }
}

}  // namespace

void dequantize_bf16(const DequantizeArgs& a, int64_t first, int64_t last) {
    if (a.dtype == DType::bf16 && !a.perm) {
        switch (a.weight.bits) {
            case 2:
                return dequantize_rows<2>(a, first, last);
            case 3:
                return dequantize_rows<3>(a, first, last);
            case 4:
                return dequantize_rows<4>(a, first, last);
            default:
                break;
        }
    }
    kAvx512Kernels.dequantize(a, first, last);
}

}  // namespace hf_spqr
