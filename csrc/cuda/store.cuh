// Reading and writing one number of a run-time dtype.
#pragma once
#include "cuda/dev.cuh"
#include "cuda/matrix.h"

namespace hf_spqr {

HF_DEVICE float read_as(const void* p, int64_t i, DType dtype) {
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    const uint32_t bits = static_cast<const uint16_t*>(p)[i];
    return dtype == DType::bf16 ? dev::as_float(bits << 16) : dev::low_float(bits);
}

HF_DEVICE void write_as(void* p, int64_t i, DType dtype, float value) {
    if (dtype == DType::f32) {
        static_cast<float*>(p)[i] = value;
    } else {
        const uint32_t bits = dtype == DType::bf16 ? dev::to_bfloat2(value, 0.f) : dev::to_half2(value, 0.f);
        static_cast<uint16_t*>(p)[i] = uint16_t(bits);
    }
}

}  // namespace hf_spqr
