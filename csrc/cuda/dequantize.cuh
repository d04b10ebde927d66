// Dense weights, equal to the PyTorch reference to the last bit: every step is one fp32 operation, rounded, in its
// order.
//
// A block takes 16 rows x 16 tiles. A thread decodes one row of two tiles to fp32 in shared memory; there the outliers
// are added, and from there rows are written in long stretches.
#pragma once
#include "cuda/dense_stats.cuh"
#include "cuda/kernels.h"
#include "cuda/store.cuh"

namespace hf_spqr {

constexpr int kDequantizeTiles = 16;
constexpr int kDequantizeColumns = kDequantizeTiles * kColumns;
constexpr int kDequantizeThreads = 128;
constexpr int kDequantizeStride = kDequantizeColumns * 4 + 16;  // bytes of a row in shared memory
constexpr int kDequantizeShared = kRows * kDequantizeStride;

// Where four columns lie in their row: so permuted that nobody collides in the banks who reads every second four.
HF_DEVICE uint32_t dense_place(uint32_t four) {
    return 16 * (four ^ (four >> 3 & 1));
}

// A row of a tile, and the same with odd columns in the low halves.
template <int BITS>
struct TileRow {
    uint32_t even[BITS], odd[BITS];

    // The values of a column pair.
    template <int PAIR, Format FORMAT>
    HF_DEVICE void values(uint32_t& first, uint32_t& second, const DenseGroup<FORMAT>& group) const {
        if constexpr ((BITS < 5 || BITS == 8) && !(BITS == 3 && PAIR == 15)) {
            constexpr int v = vector_of<BITS>(PAIR), f = shift_of<BITS>(PAIR);
            first = dev::as_bits(group.template value<BITS, f>(even[v]));
            second = dev::as_bits(group.template value<BITS, f>(odd[v]));
        } else {
            const uint32_t both = code_pair(BITS, PAIR, [&](int v) { return even[v]; });
            first = dev::as_bits(group.template value<BITS, 0>(both));
            second = dev::as_bits(group.template value<BITS, 0>(both >> 16));
        }
    }
};

// Quarter I of a tile: eight columns, the first four to `to`, the others to `other`.
template <int I, int BITS, Format FORMAT>
HF_DEVICE void put_quarter(uint32_t to, uint32_t other, const TileRow<BITS>& row, const DenseGroup<FORMAT>& group) {
    uint4 v, w;
    row.template values<4 * I>(v.x, v.y, group);
    row.template values<4 * I + 1>(v.z, v.w, group);
    dev::store_shared(to + 32 * I, v);
    row.template values<4 * I + 2>(w.x, w.y, group);
    row.template values<4 * I + 3>(w.z, w.w, group);
    dev::store_shared(other + 32 * I, w);
}

// The outliers of a row that lie in a block's columns; kLanes lanes share a row.
class RowOutliers {
  public:
    static constexpr int kLanes = 8;

    HF_DEVICE RowOutliers(const Matrix& m, int row, uint32_t first_column, int lane)
        : m_(m), first_(first_column), lane_(lane & 7), mine_(0xffu << (lane & 24)), at_(0), end_(0) {
        if (!(m.outlier || m.outlier_wide) || row >= m.rows) return;
        at_ = m.outlier_row[row];
        end_ = m.outlier_row[row + 1];
    }

    // Finds the first of them, or some that are less than a fetch before it. All lanes of the warp.
    HF_DEVICE void find() {
        for (int left = end_ - at_; dev::ballot(left > kLanes);) {
            const int stride = (left + kLanes - 1) / kLanes;
            const bool early = left > kLanes && lane_ * stride < left && column(at_ + lane_ * stride) < first_;
            const uint32_t all_early = dev::ballot(early) & mine_;
            if (left <= kLanes) continue;
            // Beginning with the last of the early ones: it and what it stands for is not far away.
            const int skipped = all_early ? (dev::count_bits(all_early) - 1) * stride : 0;
            at_ += skipped;
            left = !all_early ? 0 : stride < left - skipped ? stride : left - skipped;
        }
    }

    // Adds them to the row at `row`.
    HF_DEVICE void add_to(uint32_t row) const {
        for (int i = at_ + lane_; i < end_; i += kLanes) {
            const uint32_t column = this->column(i) - first_;
            if (int(column) < 0) continue;
            if (column >= uint32_t(kDequantizeColumns)) return;
            const uint32_t place = row + dense_place(column >> 2) + (column & 3) * 4;
            dev::store_shared(place, dev::as_bits(dev::add(dev::as_float(dev::load_shared<0>(place)), value(i))));
        }
    }

  private:
    HF_DEVICE uint32_t column(int i) const {
        return m_.outlier_wide ? uint32_t(m_.outlier_wide[i]) : m_.outlier[i] & 0xffffu;
    }
    HF_DEVICE float value(int i) const {
        return m_.outlier_wide ? dev::low_float(uint32_t(m_.outlier_wide[i] >> 32)) : dev::high_float(m_.outlier[i]);
    }

    const Matrix& m_;
    uint32_t first_;
    int lane_;
    uint32_t mine_;  // lanes, as a mask
    int at_, end_;
};

// Eight columns as 16 bytes.
template <DType DTYPE>
HF_DEVICE uint4 pack_eight(uint4 v, uint4 w) {
    const auto two = [](uint32_t first, uint32_t second) {
        const float a = dev::as_float(first), b = dev::as_float(second);
        return DTYPE == DType::bf16 ? dev::to_bfloat2(a, b) : dev::to_half2(a, b);
    };
    return {two(v.x, v.y), two(v.z, v.w), two(w.x, w.y), two(w.z, w.w)};
}

// Column after column, where they are permuted or rows do not begin at whole pieces of 16 bytes.
HF_DEVICE void write_columns(const DequantizeArgs& a, uint32_t from, int64_t row, int first, int count, int lane) {
    for (int i = lane; i < count; i += 32) {
        const uint32_t bits = dev::load_shared<0>(from + dense_place(uint32_t(i) >> 2) + (i & 3) * 4);
        const int64_t column = a.perm ? a.perm[first + i] : first + i;
        write_as(a.out, row * a.out_stride + column, a.dtype, dev::as_float(bits));
    }
}

// Pieces K and following of a row, every 32nd from a lane's first one at `from`, or at `from` and `other`.
template <DType DTYPE, int K = 0>
HF_DEVICE void write_pieces(uint4* to, uint32_t from, uint32_t other, int columns_left) {
    constexpr int kColumnsOfPiece = DTYPE == DType::f32 ? 4 : 8, kBytes = 32 * kColumnsOfPiece * 4;
    if (columns_left <= 32 * K * kColumnsOfPiece) return;
    if constexpr (DTYPE == DType::f32) {
        to[32 * K] = dev::load_shared4<K * kBytes>(from);
    } else {
        to[32 * K] = pack_eight<DTYPE>(dev::load_shared4<K * kBytes>(from), dev::load_shared4<K * kBytes>(other));
    }
    if constexpr ((K + 1) * kBytes < kDequantizeColumns * 4) write_pieces<DTYPE, K + 1>(to, from, other, columns_left);
}

// Some rows of the part from row `row` on, columns [first, first + count): by a warp, from shared memory.
template <DType DTYPE>
HF_DEVICE void write_rows(const DequantizeArgs& a, uint32_t from, int64_t row, int rows, int first, int count,
                          int lane) {
    constexpr int kElement = DTYPE == DType::f32 ? 4 : 2, kColumnsOfPiece = 16 / kElement;
    // out itself is aligned: torch allocates so
    char* to = static_cast<char*>(a.out) + (row * a.out_stride + first + lane * kColumnsOfPiece) * kElement;
    const uint32_t place = dense_place(uint32_t(lane) * (kColumnsOfPiece / 4));
    for (int i = 0; i < rows; ++i) {
        write_pieces<DTYPE>(reinterpret_cast<uint4*>(to), from + place, from + (place ^ 16),
                            count - lane * kColumnsOfPiece);
        to += a.out_stride * kElement;
        from += kDequantizeStride;
    }
}

// Grid: x = row blocks from a.first_row on, y = stretches of 16 tiles from a.first_stretch on.
template <class Stats, int BITS>
HF_KERNEL(kDequantizeThreads, 6)
dequantize_kernel(const DequantizeArgs a) {
    const Matrix& m = a.weight;
    const uint32_t shared = dev::shared_address();
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), row = lane & 15;
    const int stretch = a.first_stretch + int(dev::block_y()), first = stretch * kDequantizeColumns;
    const int64_t row_block = a.first_row / kRows + dev::block_x();
    const uint32_t* stream = m.packed + row_block * m.panels.words;

    // This tile and the one four further: so all of a warp are at the same place of a panel of 8 tiles.
    const int in_block = warp + 8 * (lane >> 4), tile = stretch * kDequantizeTiles + in_block;
    TileRow<BITS> words[2];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        if (tile + 4 * p >= m.panels.tiles) break;
        const uint32_t* from = dev::keep(stream + tile_offset(m, tile + 4 * p) + row);
#pragma unroll
        for (int v = 0; v < BITS; ++v) words[p].even[v] = dev::load_stream(from + v * kRows);
    }
    constexpr int kLanes = RowOutliers::kLanes;
    const int outlier_row = dev::thread() / kLanes;
    RowOutliers outliers(m, int(row_block) * kRows + outlier_row, uint32_t(first), lane);
    if (tile < m.panels.tiles) {
        Stats stats(m, stream, tile, warp, row);
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            if (tile + 4 * p >= m.panels.tiles) break;
#pragma unroll
            for (int v = 0; v < BITS; ++v) words[p].odd[v] = words[p].even[v] >> 16;
            // The places of every two neighbouring fours are swapped in odd tiles.
            const uint32_t of_tile = shared + row * kDequantizeStride + (in_block + 4 * p) * (kColumns * 4);
            const uint32_t to = of_tile + 16 * (warp & 1), other = of_tile + 16 - 16 * (warp & 1);
            put_quarter<0>(to, other, words[p], stats.template quarter<0>(p));
            put_quarter<1>(to, other, words[p], stats.template quarter<1>(p));
            put_quarter<2>(to, other, words[p], stats.template quarter<2>(p));
            put_quarter<3>(to, other, words[p], stats.template quarter<3>(p));
        }
    }
    outliers.find();
    dev::sync_block();
    outliers.add_to(shared + outlier_row * kDequantizeStride);
    dev::sync_warp();  // a warp writes the rows whose outliers it has added
    constexpr int kRowsOfWarp = 32 / kLanes;
    const int count = m.columns - first < kDequantizeColumns ? m.columns - first : kDequantizeColumns;
    const int64_t out_row = dev::block_x() * kRows + warp * kRowsOfWarp;
    const int rows = a.part_rows - out_row < kRowsOfWarp ? int(a.part_rows - out_row) : kRowsOfWarp;
    const uint32_t from = shared + warp * kRowsOfWarp * kDequantizeStride;
    if (a.perm || a.out_stride * (a.dtype == DType::f32 ? 4 : 2) % 16 != 0) {
        for (int i = 0; i < rows; ++i) {
            write_columns(a, from + i * kDequantizeStride, out_row + i, first, count, lane);
        }
    } else if (a.dtype == DType::f32) {
        write_rows<DType::f32>(a, from, out_row, rows, first, count, lane);
    } else if (a.dtype == DType::bf16) {
        write_rows<DType::bf16>(a, from, out_row, rows, first, count, lane);
    } else {
        write_rows<DType::f16>(a, from, out_row, rows, first, count, lane);
    }
}

}  // namespace hf_spqr
