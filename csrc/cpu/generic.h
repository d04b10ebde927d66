// The kernels that work for every matrix: each tile is dequantized to fp32 once and used for all tokens.
// Included by one file per instruction set, which exports them under its own name.
#pragma once
#include "cpu/dequantize.h"
#include "cpu/kernels.h"
#include "cpu/row_block.h"

namespace hf_spqr {
namespace {

// sum[t][row] += w[column][row] * x[t][column] over a tile, for T tokens. Several chains of sums hide the latency. A
// tile is added up by itself: columns one by one to a total of many would round much more.
#if defined(__aarch64__)

// One column, which lies in lane I of x.
template <int I, int T, int V>
__attribute__((always_inline)) inline void multiply_column(const float* w, const float32x4_t* x,
                                                           float32x4_t (*sum)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        const float32x4_t weights = vld1q_f32(w + I * kRows + v * kLanes);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[t][v] = vfmaq_laneq_f32(sum[t][v], weights, x[t], I);
    }
}

// Four columns of x are a vector, by whose lanes NEON multiplies; many rows at once share it.
template <int T>
void multiply_tile(const float* w, const float* x, int64_t x_stride, float* sum) {
    constexpr int kVectors = T <= 4 ? 4 : 2;
    for (int lane = 0; lane < kRows; lane += kVectors * kLanes) {
        float32x4_t s[T][kVectors] = {};
        for (int column = 0; column < kColumns; column += kLanes) {
            float32x4_t four[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) four[t] = vld1q_f32(x + t * x_stride + column);
            const float* of_column = w + column * kRows + lane;
            multiply_column<0, T, kVectors>(of_column, four, s);
            multiply_column<1, T, kVectors>(of_column, four, s);
            multiply_column<2, T, kVectors>(of_column, four, s);
            multiply_column<3, T, kVectors>(of_column, four, s);
        }
        for (int t = 0; t < T; ++t) {
            for (int v = 0; v < kVectors; ++v) {
                float* to = sum + t * kRows + lane + v * kLanes;
                vst1q_f32(to, vaddq_f32(vld1q_f32(to), s[t][v]));
            }
        }
    }
}

#else

template <int T>
void multiply_tile(const float* w, const float* x, int64_t x_stride, float* sum) {
    constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;
    for (int lane = 0; lane < kRows; lane += kLanes) {
        VecF s[T][kChains];
        for (int t = 0; t < T; ++t) {
            for (int c = 0; c < kChains; ++c) s[t][c] = VecF{};
        }
#pragma GCC unroll 8
        for (int column = 0; column < kColumns; ++column) {
            const VecF v = load(w + column * kRows + lane);
            for (int t = 0; t < T; ++t) s[t][column % kChains] += v * splat(x[t * x_stride + column]);
        }
        for (int t = 0; t < T; ++t) {
            for (int c = 1; c < kChains; ++c) s[t][0] += s[t][c];
            store(sum + t * kRows + lane, load(sum + t * kRows + lane) + s[t][0]);
        }
    }
}

#endif

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

// sum[t][row] += the outliers of the block's rows.
inline void multiply_outliers(const LinearArgs& a, int64_t block, float* sum) {
    const Matrix& m = a.weight;
    if (m.outlier_row == nullptr) return;
    for (int64_t row = block * kRows, r = 0; r < kRows && row < m.rows; ++r, ++row) {
        for (int64_t i = m.outlier_row[row]; i < m.outlier_row[row + 1]; ++i) {
            const uint64_t column = m.outlier ? m.outlier[i] & 0xffff : m.outlier_wide[i] & 0xffffffff;
            const float v = from_f16(m.outlier ? uint16_t(m.outlier[i] >> 16) : uint16_t(m.outlier_wide[i] >> 32));
            for (int t = 0; t < a.tokens; ++t) sum[t * kRows + r] += v * a.x[t * a.x_stride + column];
        }
    }
}

// What is left to do with the sums of a block of rows.
__attribute__((noinline)) void finish_rows(const LinearArgs& a, int64_t block, float* sum) {
    multiply_outliers(a, block, sum);
    const int64_t row = block * kRows;
    const int rows = a.weight.rows - row < kRows ? int(a.weight.rows - row) : kRows;
    for (int t = 0; t < a.tokens; ++t) {
        for (int r = 0; r < rows; ++r) {
            const float bias = a.bias ? load_one(a.bias, row + r, a.dtype) : 0.f;
            store_one(a.y, t * a.y_stride + row + r, sum[t * kRows + r] + bias, a.dtype);
        }
    }
}

void linear_generic(const LinearArgs& a, int64_t first_block, int64_t last_block) {
    alignas(64) float sum[kMaxTokens * kRows];
    const DotTile dot = dot_tile_of(a.weight.bits);
    const int group_shift = group_shift_in_tile(a.weight);
    for (int64_t block = first_block; block < last_block; ++block) {
        memset(sum, 0, sizeof(float) * a.tokens * kRows);
        if (a.tokens == 1) {
            for_each_packed_tile(a.weight, block,
                                 [&](int64_t first, const uint32_t* tile, const float* scale, const float* shift) {
                                     dot(tile, scale, shift, group_shift, a.x + first, sum);
                                 });
        } else {
            for_each_tile(a.weight, block, [&](int64_t first, const float* w) {
                multiply_tile_any(w, a.x + first, a.x_stride, a.tokens, sum);
            });
        }
        finish_rows(a, block, sum);
    }
}

uint32_t read_generic(const uint32_t* p, int64_t words) {
    VecU a{}, b{};
    for (int64_t i = 0; i + 2 * kLanes <= words; i += 2 * kLanes) {
        a ^= load(p + i);
        b ^= load(p + i + kLanes);
    }
    uint32_t result = 0;
    for (int i = 0; i < kLanes; ++i) result ^= a[i] ^ b[i];
    return result;
}

template <DType D>
void prepare_token(const PrepareArgs& a, int64_t t) {
    float* out = a.out + t * a.out_stride;
    const int64_t base = t * a.x_stride;
    if (a.perm) {
        for (int64_t k = 0; k < a.columns; ++k) out[k] = load_one(a.x, base + a.perm[k], D);
    } else {
        for (int64_t k = 0; k < a.columns; ++k) out[k] = load_one(a.x, base + k, D);
    }
    for (int64_t k = a.columns; k < a.padded_columns; ++k) out[k] = 0.f;
}

void prepare_generic(const PrepareArgs& a, int64_t first_token, int64_t last_token) {
    const auto prepare = a.dtype == DType::f32    ? prepare_token<DType::f32>
                         : a.dtype == DType::bf16 ? prepare_token<DType::bf16>
                                                  : prepare_token<DType::f16>;
    for (int64_t t = first_token; t < last_token; ++t) prepare(a, t);
}

}  // namespace
}  // namespace hf_spqr
