// What csrc/torch and the tests must decide alike: how x goes into the linear kernel.
#pragma once
#include "cuda/kernels.h"

namespace hf_spqr {

// fp16 in stored order with rows of whole 16-byte pieces goes in as it is.
inline bool needs_prepare(DType dtype, bool permuted, int64_t columns) {
    return dtype != DType::f16 || permuted || columns % 8 != 0;
}

inline int64_t prepared_stride(int64_t columns) {
    return (columns + 7) / 8 * 8;
}

}  // namespace hf_spqr
