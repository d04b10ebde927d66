// Integer execution on CUDA: quantize_activation and w_int8_linear.
#pragma once
#include <tuple>
#include "torch/check_cuda.h"

namespace hf_spqr {

// int8 code [..., K], float32 scale and int32 zero [..., 1].
std::tuple<Tensor, Tensor, Tensor> quantize_cuda(const char* op, const Tensor& x, const OptionalTensor& perm,
                                                 int64_t bits, bool symmetric);

// code int8 [..., K] of values of act_bits, scale and zero [..., 1] -> [..., N] of dtype.
Tensor int8_linear_cuda(const char* op, const Tensor& code, const Tensor& scale, const Tensor& zero, const Matrix&,
                        const OptionalTensor& bias, ScalarType dtype, int64_t act_bits);

}  // namespace hf_spqr
