// Activations rounded to int8.
#include "cpu/batch_vnni.h"
#include "cpu/prepare_blocks.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

// Where it was measured to be faster than the exact kernels: not for as few tokens as these multiply together, nor for
// prompts where there are outliers or groups of 8.
bool takes(const Matrix& m, DType, int64_t tokens) {
    return tokens > (has_gemv_vnni(m) ? kMostTogether : 1) &&
           (tokens <= kMaxTokens || (m.outlier_row == nullptr && m.group != 8));
}

int64_t bytes(const Matrix& m, int64_t tokens) {
    return TokenBlocks<1>(m, tokens, nullptr).bytes();
}

}  // namespace

extern const RoundedKernels kVnniRounded = {takes, bytes, prepare_blocks<1>, linear_blocks<1>};

}  // namespace hf_spqr
