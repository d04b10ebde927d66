// The parts of the BF16 kernels. Each lies in a file of its own.
#pragma once
#include "cpu/kernels.h"

namespace hf_spqr {

// bf16 activations, any matrix, 1 to kMaxTokens tokens.
int64_t halves_bytes(const Matrix&, int64_t tokens);
void prepare_halves(const PrepareArgs&, int64_t first, int64_t last);
void batch_bf16(const LinearArgs&, int64_t first, int64_t last);
// The same where rounds_weights (halves.h).
void prefill_bf16(const LinearArgs&, int64_t first, int64_t last);
// Dense rows.
void dequantize_bf16(const DequantizeArgs&, int64_t first, int64_t last);

}  // namespace hf_spqr
