// Dense weights, equal to the PyTorch reference to the last bit: every step is one fp32 operation, rounded, in its
// order.
//
// A block takes 16 rows x 16 tiles. A thread decodes one row of one tile into shared memory; then rows are written out
// in long stretches. A second kernel writes the places of outliers again, dense value and outlier together.
#pragma once
#include <utility>
#include "cuda/kernels.h"
#include "cuda/stats_any.cuh"
#include "cuda/store.cuh"

namespace hf_spqr {

constexpr int kDequantizeTiles = 16;
constexpr int kDequantizeColumns = kDequantizeTiles * kColumns;

HF_CONSTANT int dequantize_stride(int element) {  // bytes of a row in shared memory
    return kDequantizeColumns * element + 16;
}

// Both codes of a pair, even column in the low half.
template <int BITS, int PAIR>
HF_DEVICE uint32_t code_pair(const uint32_t* w) {
    if constexpr (BITS == 5 || BITS == 6 || BITS == 7) {
        return code_pair<4, PAIR>(w) | code_pair<BITS - 4, PAIR>(w + 4) << 4;
    } else if constexpr (BITS == 3 && PAIR == 15) {
        return (w[0] >> 15 & 0x00010001u) | (w[1] >> 14 & 0x00020002u) | (w[2] >> 13 & 0x00040004u);
    } else {
        return w[vector_of<BITS>(PAIR)] >> shift_of<BITS>(PAIR) & ((1u << BITS) - 1) * 0x00010001u;
    }
}

HF_DEVICE float code_float(uint32_t code) {  // exact below 2^23
    return dev::add(dev::as_float(0x4b000000u | code), -8388608.f);
}

HF_DEVICE float dense_value(ScaleZero sz, uint32_t code) {
    return dev::mul(sz.scale, dev::add(code_float(code), -sz.zero));
}

HF_DEVICE void put_pair(unsigned char* row, int pair, DType dtype, float even, float odd) {
    if (dtype == DType::f32) {
        *reinterpret_cast<float2*>(row + 8 * pair) = make_float2(even, odd);
    } else {
        const uint32_t both = dtype == DType::bf16 ? dev::to_bfloat2(even, odd) : dev::to_half2(even, odd);
        *reinterpret_cast<uint32_t*>(row + 4 * pair) = both;
    }
}

// Four pairs, one quarter of a tile: always in one group.
template <int BITS, int FIRST, int... I>
HF_DEVICE void put_quarter(unsigned char* row, const uint32_t* w, ScaleZero sz, DType dtype,
                           std::integer_sequence<int, I...>) {
    const uint32_t codes[] = {code_pair<BITS, FIRST + I>(w)...};
#pragma unroll
    for (int i = 0; i < int(sizeof...(I)); ++i) {
        put_pair(row, FIRST + i, dtype, dense_value(sz, codes[i] & 0xffffu), dense_value(sz, codes[i] >> 16));
    }
}

// Row `row` of the block's part of the matrix, columns [first, first + count), from shared memory.
HF_DEVICE void copy_row(const DequantizeArgs& a, const unsigned char* from, int64_t row, int first, int count,
                        int lane) {
    const int element = a.dtype == DType::f32 ? 4 : 2;
    unsigned char* to = static_cast<unsigned char*>(a.out) + row * a.out_stride * element;
    if (a.perm == nullptr && a.out_stride * element % 16 == 0) {  // out itself is aligned: torch allocates so
        to += int64_t(first) * element;
        for (int i = 16 * lane; i < count * element; i += 16 * 32) {
            *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
        }
        return;
    }
    for (int i = lane; i < count; i += 32) {
        const int64_t column = a.perm ? a.perm[first + i] : first + i;
        if (element == 4) {
            reinterpret_cast<float*>(to)[column] = reinterpret_cast<const float*>(from)[i];
        } else {
            reinterpret_cast<uint16_t*>(to)[column] = reinterpret_cast<const uint16_t*>(from)[i];
        }
    }
}

// Grid: x = row blocks from a.first_row on, y = stretches of 16 tiles.
template <Format FORMAT, int BITS>
HF_KERNEL(256, 2)
dequantize_kernel(const DequantizeArgs a) {
    const Matrix& m = a.weight;
    unsigned char* shared = dev::shared_memory();
    const int row = dev::thread() & 15, in_block = dev::thread() >> 4,
              tile = int(dev::block_y()) * kDequantizeTiles + in_block;
    const int64_t row_block = a.first_row / kRows + dev::block_x();
    const uint32_t* stream = m.packed + row_block * m.panels.words;
    const int element = a.dtype == DType::f32 ? 4 : 2, stride = dequantize_stride(element);
    if (tile < m.panels.tiles) {
        const uint32_t* from = stream + tile_offset(m, tile) + row;
        uint32_t w[BITS];
#pragma unroll
        for (int v = 0; v < BITS; ++v) w[v] = dev::load_stream(from + v * kRows);
        const StatReader<FORMAT> reader(m, stream);
        unsigned char* to = shared + row * stride + in_block * kColumns * element;
        int group = tile * kColumns >> m.panels.group_shift;
        ScaleZero sz = reader.read(group, row);
        const auto next = [&](int column) {  // statistics of a quarter; past the end there are none, and nobody looks
            const int wanted = (tile * kColumns + column) >> m.panels.group_shift;
            if (wanted != group && wanted < m.panels.groups) sz = reader.read(group = wanted, row);
        };
        using Four = std::make_integer_sequence<int, 4>;
        put_quarter<BITS, 0>(to, w, sz, a.dtype, Four{});
        next(8);
        put_quarter<BITS, 4>(to, w, sz, a.dtype, Four{});
        next(16);
        put_quarter<BITS, 8>(to, w, sz, a.dtype, Four{});
        next(24);
        put_quarter<BITS, 12>(to, w, sz, a.dtype, Four{});
    }
    dev::sync_block();
    const int first = int(dev::block_y()) * kDequantizeColumns, lane = dev::thread() & 31;
    const int count = m.columns - first < kDequantizeColumns ? m.columns - first : kDequantizeColumns;
    for (int r = dev::thread() >> 5; r < kRows; r += 8) {
        const int64_t out_row = dev::block_x() * kRows + r;
        if (out_row < a.part_rows) copy_row(a, shared + r * stride, out_row, first, count, lane);
    }
}

HF_DEVICE float dense_at(const Matrix& m, const StatReader<Format::spqr>& reader, const uint32_t* stream, int row,
                         int column) {
    const ScaleZero sz = reader.read(column >> m.panels.group_shift, row);
    const uint32_t pair = code_pair(m.bits, column % kColumns >> 1, stream + tile_offset(m, column / kColumns), row);
    return dense_value(sz, column & 1 ? pair >> 16 : pair & 0xffffu);
}

// Grid: x = rows of the part. After dequantize_kernel in the same stream.
static HF_KERNEL(128, 1) add_outliers_kernel(const DequantizeArgs a) {
    const Matrix& m = a.weight;
    const int64_t part_row = dev::block_x(), row = a.first_row + part_row;
    const uint32_t* stream = m.packed + row / kRows * m.panels.words;
    const StatReader<Format::spqr> reader(m, stream);
    const int end = m.outlier_row[row + 1];
    for (int i = m.outlier_row[row] + dev::thread(); i < end; i += 128) {
        int column;
        float value;
        if (m.outlier_wide) {
            const uint64_t entry = m.outlier_wide[i];
            column = int(entry & 0xffffffffu);
            value = dev::low_float(uint32_t(entry >> 32));
        } else {
            const uint32_t entry = m.outlier[i];
            column = int(entry & 0xffffu);
            value = dev::high_float(entry);
        }
        const float sum = dev::add(dense_at(m, reader, stream, int(row % kRows), column), value);
        write_as(a.out, part_row * a.out_stride + (a.perm ? a.perm[column] : column), a.dtype, sum);
    }
}

}  // namespace hf_spqr
