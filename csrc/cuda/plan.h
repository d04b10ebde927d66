// What csrc/torch and the tests must decide alike: how x goes into the linear kernels.
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

// The integer kernels take int8 in stored order with rows of whole 16-byte pieces as it is.
inline bool needs_pad(int64_t columns) {
    return columns % 16 != 0;
}

inline int64_t padded_stride(int64_t columns) {
    return (columns + 15) / 16 * 16;
}

}  // namespace hf_spqr
