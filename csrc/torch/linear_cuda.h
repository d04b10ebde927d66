// What spqr_linear and affine_linear, and the two dequantize ops, share on CUDA.
#pragma once
#include "torch/check_cuda.h"

namespace hf_spqr {

// x [..., K] -> [..., N] of the same dtype. The way is chosen by shapes and dtypes only. Few tokens: straight from the
// packed weights. More: dequantized in stretches of bounded size for torch's own matrix product.
Tensor linear_cuda(const char* op, const Tensor& x, const Matrix&, const OptionalTensor& perm,
                   const OptionalTensor& bias);

// [N, K] of dtype, columns in the original order; a new tensor on the device of `like`.
Tensor dequantize_cuda(const char* op, const Tensor& like, const Matrix&, const OptionalTensor& perm,
                       ScalarType dtype);

}  // namespace hf_spqr
