// Every format and any number of tokens up to kPromptTokens, exact.
#include "cpu/batch_vnni.h"
#include "cpu/prepare_blocks.h"
#include "cpu/vnni.h"

namespace hf_spqr {

int64_t batch_bytes_vnni(const Matrix& m, int64_t tokens) {
    return TokenBlocks<2>(m, tokens, nullptr).bytes();
}

void prepare_batch_vnni(const PrepareArgs& a, int64_t first, int64_t last) {
    prepare_blocks<2>(a, first, last);
}

void batch_vnni(const LinearArgs& a, int64_t first, int64_t last) {
    linear_blocks<2>(a, first, last);
}

}  // namespace hf_spqr
