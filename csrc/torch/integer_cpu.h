// quantize_activation and w_int8_linear on the CPU.
#pragma once
#include <tuple>
#include "torch/check.h"

namespace hf_spqr {

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, const std::optional<Tensor>& perm,
                                                       int64_t bits, bool symmetric);

Tensor w_int8_linear(const Tensor& code, const Tensor& scale, const Tensor& zero, const Tensor& packed,
                     const std::optional<Tensor>& bias, int64_t out_features, int64_t bits, int64_t group_size,
                     bool symmetric, bool scale_bf16, ScalarType dtype, int64_t act_bits);

}  // namespace hf_spqr
