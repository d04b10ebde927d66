// A token's columns out of memory. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/kernels.h"

namespace hf_spqr {
namespace {

// 32 columns of a bf16 token in stored order, from `first` on; zeros after the last.
inline __m512i load_columns(const PrepareArgs& a, const uint16_t* x, int64_t first) {
    const int64_t left = a.columns - first;
    if (a.perm) {
        alignas(64) uint16_t columns[kColumns] = {};
        for (int64_t i = 0; i < kColumns && i < left; ++i) columns[i] = x[a.perm[first + i]];
        return _mm512_load_si512(columns);
    }
    const __mmask32 mask = left >= kColumns ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0u;
    return _mm512_maskz_loadu_epi16(mask, x + first);
}

}  // namespace
}  // namespace hf_spqr
