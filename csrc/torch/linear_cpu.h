// What spqr_linear and affine_linear, and the two dequantize ops, share on the CPU.
#pragma once
#include "torch/check.h"

namespace hf_spqr {

// x [..., K] -> [..., N] of the same dtype. Few tokens: straight from the packed weights. Many: dequantized in
// stretches of bounded size for torch's own matrix product. int8_activations: x may be rounded where that is faster.
Tensor linear_cpu(const char* op, const Tensor& x, const Matrix&, const std::optional<Tensor>& perm,
                  const std::optional<Tensor>& bias, bool int8_activations);

// [N, K] of dtype, columns in the original order; a new tensor on the device of `like`.
Tensor dequantize_cpu(const char* op, const Tensor& like, const Matrix&, const std::optional<Tensor>& perm,
                      ScalarType dtype);

}  // namespace hf_spqr
