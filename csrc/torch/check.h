// Argument checks of the ops, each with a message that names the argument, and the way from tensors to a Matrix.
#pragma once
#include <optional>
#include "cpu/matrix.h"
// after the matrix
#include "torch/layout.h"

namespace hf_spqr {

// `op` begins every message.
Matrix spqr_matrix(const char* op, const Tensor& packed, const Tensor& outlier_row, const Tensor& outlier,
                   int64_t in_features, const SpqrLayout&);
Matrix affine_matrix(const char* op, const Tensor& packed, int64_t in_features, const AffineLayout&);

// Pointer to an int32 permutation of in_features columns, null where there is none.
const int32_t* permutation(const char* op, const std::optional<Tensor>& perm, int64_t in_features);

// Pointer to the bias of the rows, null where there is none. `named` says what its dtype must be.
const void* bias_pointer(const char* op, const std::optional<Tensor>& bias, int64_t rows, ScalarType,
                         const char* named);

}  // namespace hf_spqr
