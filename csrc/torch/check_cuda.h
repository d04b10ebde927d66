// Argument checks of the CUDA ops, each with a message that names the argument, and the way from tensors to a Matrix.
// Nothing here reads device memory: indices were checked when the file was loaded.
#pragma once
#include <optional>
#include "cuda/matrix.h"
// after the matrix
#include "torch/layout.h"

namespace hf_spqr {

using OptionalTensor = std::optional<Tensor>;

// `op` begins every message. `device` is the index of the GPU that all tensors must be on.
Matrix spqr_matrix(const char* op, int device, const Tensor& packed, const Tensor& outlier_row, const Tensor& outlier,
                   int64_t in_features, const SpqrLayout&);
Matrix affine_matrix(const char* op, int device, const Tensor& packed, int64_t in_features, const AffineLayout&);

// Pointer to an int32 permutation of in_features columns, null where there is none.
const int32_t* permutation(const char* op, int device, const OptionalTensor& perm, int64_t in_features);

// Pointer to a bias of out_features numbers of `dtype`, null where there is none.
const void* bias_of(const char* op, int device, const OptionalTensor& bias, int64_t out_features, ScalarType dtype,
                    const char* dtype_name);

// Throws unless t is contiguous, of that dtype and on that GPU.
void check_tensor(const char* op, const char* name, int device, const Tensor& t, ScalarType dtype,
                  const char* dtype_name);

constexpr int64_t kMostFeatures = int64_t(1) << 26;

// numel / columns. Throws if one call cannot have so many.
int64_t token_count(const char* op, int64_t numel, int64_t columns);

// torch's current stream on that GPU.
void* current_stream(int device);

// Throws unless the launch of `kernel` gave 0.
void check_launch(const char* op, const char* kernel, int status);

// The index of x's GPU. Throws unless x is a CUDA tensor of at least one dimension.
int device_of(const char* op, const char* name, const Tensor&);

}  // namespace hf_spqr
