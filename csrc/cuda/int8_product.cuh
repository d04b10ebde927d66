// The integer of one output and what becomes of it (hf_spqr/ops/reference.py, w_int8_linear):
// sum (x - z_x) (q - z_w) = sum x q - z_x sum q - z_w sum x + K z_x z_w, and the float operations after it, each
// rounded by itself.
#pragma once
#include "cuda/kernels.h"
#include "cuda/stats_any.cuh"
#include "cuda/store.cuh"

namespace hf_spqr {

// Up to so many columns the integer fits int32, 255 * 255 each; then the terms may wrap around.
constexpr int kInt32Columns = 33025;
// Up to so many columns the terms fit int32, and are put together in int64.
constexpr int kTermColumns = 65536;

HF_DEVICE int product_of(int columns, int dot, int w_sum, int x_sum, int w_zero, int x_zero) {
    const uint32_t w = uint32_t(w_sum) - uint32_t(columns) * uint32_t(w_zero);
    return int(uint32_t(dot) - uint32_t(w_zero) * uint32_t(x_sum) - uint32_t(x_zero) * w);
}

HF_DEVICE float float_product_of(int columns, int64_t dot, int64_t w_sum, int64_t x_sum, int w_zero, int x_zero) {
    if (columns <= kInt32Columns) {
        return dev::float_of(product_of(columns, int(dot), int(w_sum), int(x_sum), w_zero, x_zero));
    }
    return float(dot - w_zero * x_sum - x_zero * (w_sum - int64_t(columns) * w_zero));
}

// Scale and zero point of a group and row in one word: the scale's 16 bits over the zero point.
HF_DEVICE uint32_t statistics_word(const Matrix& m, const ScaleZero& s) {
    const uint32_t scale = m.scale_bf16 ? dev::as_bits(s.scale) >> 16 : dev::to_half2(s.scale, 0.f);
    return scale << 16 | uint32_t(int(s.zero));
}

HF_DEVICE ScaleZero statistics_of(const Matrix& m, uint32_t word) {
    return {m.scale_bf16 ? dev::as_float(word & 0xffff0000u) : dev::high_float(word), float(word & 0xffffu)};
}

HF_DEVICE void write_output(const Int8Args& a, int64_t token, int64_t row, float y) {
    if (a.bias) y = dev::add(y, read_as(a.bias, row, a.dtype));
    write_as(a.y, token * a.weight.rows + row, a.dtype, y);
}

}  // namespace hf_spqr
