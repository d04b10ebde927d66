// The parts of the VNNI kernels. Each lies in a file of its own.
#pragma once
#include "cpu/kernels.h"

namespace hf_spqr {

// Activations of one token (planes.h), for matrices that has_gemv_vnni accepts.
int64_t planes_bytes_vnni(const Matrix&);
void split_planes_vnni(const Matrix&, const float* x, char* planes);

// One token of SpQR, row blocks [first, last), for matrices that has_gemv_spqr_vnni accepts.
bool has_gemv_spqr_vnni(const Matrix&);
void gemv_spqr_vnni(const LinearArgs&, int64_t first, int64_t last);
// One token of either format, for matrices that has_gemv_vnni accepts.
bool has_gemv_vnni(const Matrix&);
void gemv_vnni(const LinearArgs&, int64_t first, int64_t last);
// Any matrix, 1 to kPromptTokens tokens, with activations as prepare_batch_vnni leaves them.
int64_t batch_bytes_vnni(const Matrix&, int64_t tokens);
void prepare_batch_vnni(const PrepareArgs&, int64_t first, int64_t last);
void batch_vnni(const LinearArgs&, int64_t first, int64_t last);

}  // namespace hf_spqr
