// fp32 vectors rounded to 16 bits. Internal linkage (see vec.h).
#pragma once
#include "cpu/vec.h"

namespace hf_spqr {
namespace {

// In the low halves of its words.
inline VecU bf16_bits(VecF v) {
    const VecU u = (VecU)v, nan = (VecU)(v != v);
    return (((u + 0x7fff + (u >> 16 & 1)) >> 16) & ~nan) | (nan & 0x7fc0);
}

inline VecU f16_bits(VecF v) {
#if defined(__AVX512F__)
    return (VecU)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    return (VecU)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
    return (VecU)vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
    VecU bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = to_f16(v[i]);
    return bits;
#endif
}

}  // namespace
}  // namespace hf_spqr
