// The parts of the VNNI kernels. Each lies in a file of its own.
#pragma once
#include "cpu/kernels.h"

namespace hf_spqr {

// Up to kMostFew tokens (planes.h), for matrices that has_gemv_vnni accepts. x: fp32 in stored order, rows zero padded
// to whole tiles.
int64_t few_bytes_vnni(const Matrix&, int64_t tokens);
void prepare_few_vnni(const Matrix&, const float* x, int64_t stride, int64_t tokens, char* out);

// These of SpQR, row blocks [first, last), for matrices that has_gemv_spqr_vnni accepts.
bool has_gemv_spqr_vnni(const Matrix&);
void gemv_spqr_vnni(const LinearArgs&, int64_t first, int64_t last);
// Of either format, for matrices that has_gemv_vnni accepts.
bool has_gemv_vnni(const Matrix&);
void gemv_vnni(const LinearArgs&, int64_t first, int64_t last);
// Any matrix, 1 to kPromptTokens tokens, with activations as prepare_batch_vnni leaves them.
int64_t batch_bytes_vnni(const Matrix&, int64_t tokens);
void prepare_batch_vnni(const PrepareArgs&, int64_t first, int64_t last);
void batch_vnni(const LinearArgs&, int64_t first, int64_t last);

}  // namespace hf_spqr
