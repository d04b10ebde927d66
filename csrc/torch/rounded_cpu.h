// spqr_linear and affine_linear on activations rounded to int8, on the CPU.
#pragma once
#include "torch/check.h"

namespace hf_spqr {

// Whether there is a kernel for it that is faster than the exact one.
bool takes_rounded(const Matrix&, DType, int64_t tokens);

// y[tokens, N] of x[tokens, K], both contiguous; order as permutation() gives it, bias as bias_pointer().
void linear_rounded(const Tensor& x, const Matrix&, const int32_t* order, const void* bias, DType, Tensor& y);

}  // namespace hf_spqr
