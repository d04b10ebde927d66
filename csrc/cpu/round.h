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

// Two vectors, in the low and in the high halves of the words.
inline VecU bf16_pairs(VecF low, VecF high) {
#if defined(__aarch64__)
    const auto rounded = [](VecF v) {
        const uint32x4_t u = (uint32x4_t)v, odd = vandq_u32(u, vdupq_n_u32(0x10000));
        const uint32x4_t up = vsraq_n_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd, 16);
        return vbslq_u32(vceqq_f32((float32x4_t)v, (float32x4_t)v), up, vdupq_n_u32(0x7fc00000));
    };
    const uint32x4_t above = rounded(high), below = rounded(low);
    return (VecU)vsriq_n_u32(above, below, 16);
#else
    return bf16_bits(low) | bf16_bits(high) << 16;
#endif
}

inline VecU f16_pairs(VecF low, VecF high) {
#if defined(__aarch64__)
    const uint16x4_t below = (uint16x4_t)vcvt_f16_f32((float32x4_t)low);
    const uint16x4_t above = (uint16x4_t)vcvt_f16_f32((float32x4_t)high);
    return (VecU)vzip1q_u16(vcombine_u16(below, below), vcombine_u16(above, above));
#else
    return f16_bits(low) | f16_bits(high) << 16;
#endif
}

}  // namespace
}  // namespace hf_spqr
