// The kernels that work for every matrix: each tile is dequantized to fp32 once and used for all tokens.
// Included by one file per instruction set, which exports them under its own name.
#pragma once
#include "cpu/kernels.h"
#include "cpu/row_block.h"

namespace hf_spqr {
namespace {

// sum[t][row] += w[column][row] * x[t][column] over a tile, for T tokens. Several chains of sums hide the latency.
template <int T>
void multiply_tile(const float* w, const float* x, int64_t x_stride, float* sum) {
    constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;
    for (int lane = 0; lane < kRows; lane += kLanes) {
        VecF s[T][kChains];
        for (int t = 0; t < T; ++t) {
            s[t][0] = load(sum + t * kRows + lane);
            for (int c = 1; c < kChains; ++c) s[t][c] = VecF{};
        }
#pragma GCC unroll 8
        for (int column = 0; column < kColumns; ++column) {
            const VecF v = load(w + column * kRows + lane);
            for (int t = 0; t < T; ++t) s[t][column % kChains] += v * splat(x[t * x_stride + column]);
        }
        for (int t = 0; t < T; ++t) {
            for (int c = 1; c < kChains; ++c) s[t][0] += s[t][c];
            store(sum + t * kRows + lane, s[t][0]);
        }
    }
}

inline void multiply_tile_any(const float* w, const float* x, int64_t x_stride, int tokens, float* sum) {
    int t = 0;
    for (; t + 8 <= tokens; t += 8) multiply_tile<8>(w, x + t * x_stride, x_stride, sum + t * kRows);
    if (tokens - t >= 4) {
        multiply_tile<4>(w, x + t * x_stride, x_stride, sum + t * kRows);
        t += 4;
    }
    if (tokens - t >= 2) {
        multiply_tile<2>(w, x + t * x_stride, x_stride, sum + t * kRows);
        t += 2;
    }
    if (tokens - t >= 1) multiply_tile<1>(w, x + t * x_stride, x_stride, sum + t * kRows);
}

void linear_generic(const LinearArgs& a, int64_t first_block, int64_t last_block) {
    alignas(64) float sum[kMaxTokens * kRows];
    for (int64_t block = first_block; block < last_block; ++block) {
        memset(sum, 0, sizeof(float) * a.tokens * kRows);
        for_each_tile(a.weight, block, [&](int64_t first, const float* w) {
            multiply_tile_any(w, a.x + first, a.x_stride, a.tokens, sum);
        });
        const int64_t row = block * kRows;
        const int rows = a.weight.rows - row < kRows ? int(a.weight.rows - row) : kRows;
        for (int t = 0; t < a.tokens; ++t) {
            for (int r = 0; r < rows; ++r) {
                const float bias = a.bias ? load_one(a.bias, row + r, a.dtype) : 0.f;
                store_one(a.y, t * a.y_stride + row + r, sum[t * kRows + r] + bias, a.dtype);
            }
        }
    }
}

template <DType D>
void store_row(const float* w, const DequantizeArgs& a, int64_t row, int64_t first, int columns, int r) {
    for (int c = 0; c < columns; ++c) {
        const int64_t column = a.perm ? a.perm[first + c] : first + c;
        store_one(a.out, row * a.out_stride + column, w[c * kRows + r], D);
    }
}

void dequantize_generic(const DequantizeArgs& a, int64_t first_block, int64_t last_block) {
    const Matrix& m = a.weight;
    const auto store_row_of = a.dtype == DType::f32    ? store_row<DType::f32>
                              : a.dtype == DType::bf16 ? store_row<DType::bf16>
                                                       : store_row<DType::f16>;
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t row = block * kRows;
        const int rows = m.rows - row < kRows ? int(m.rows - row) : kRows;
        for_each_tile(m, block, [&](int64_t first, const float* w) {
            const int columns = m.columns - first < kColumns ? int(m.columns - first) : kColumns;
            for (int r = 0; r < rows; ++r) {
                store_row_of(w, a, (block - first_block) * kRows + r, first, columns, r);
            }
        });
    }
}

void prepare_generic(const PrepareArgs& a, int64_t first_token, int64_t last_token) {
    for (int64_t t = first_token; t < last_token; ++t) {
        float* out = a.out + t * a.out_stride;
        const int64_t base = t * a.x_stride;
        for (int64_t k = 0; k < a.columns; ++k) out[k] = load_one(a.x, base + (a.perm ? a.perm[k] : k), a.dtype);
        for (int64_t k = a.columns; k < a.padded_columns; ++k) out[k] = 0.f;
    }
}

}  // namespace
}  // namespace hf_spqr
