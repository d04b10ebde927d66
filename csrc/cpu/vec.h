// A vector of as many 32-bit lanes as the instruction set of this file has, on the compilers' vector extensions, so
// that one source serves every instruction set. Internal linkage: included by files with different flags.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include "cpu/matrix.h"

namespace hf_spqr {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));

inline VecF load(const float* p) {
    VecF v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline VecU load(const uint32_t* p) {
    VecU v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, VecF v) {
    memcpy(p, &v, sizeof v);
}
inline VecF to_float(VecU v) {
    return __builtin_convertvector((VecI)v, VecF);
}  // for values below 2^31
inline VecF splat(float v) {
#if defined(__aarch64__)
    return (VecF)vdupq_n_f32(v);  // 0 + v is v but for its sign: an addition, for the compiler
#else
    return VecF{} + v;
#endif
}

inline float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline uint32_t as_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

inline float from_bf16(uint16_t h) {
    return as_float(uint32_t(h) << 16);
}

inline uint16_t to_bf16(float f) {  // to nearest even; NaN stays NaN
    const uint32_t u = as_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(__aarch64__)
    __fp16 f;
    memcpy(&f, &h, sizeof f);
    return f;
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
    if ((h & 0x7c00) == 0x7c00) return as_float(sign | rest | 0x7f800000u);
    return as_float(sign | as_bits(as_float(rest) * 0x1p112f));  // also right for subnormal numbers
#endif
}

inline uint16_t to_f16(float f) {  // to nearest even; NaN stays NaN
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(f, 0));
#elif defined(__aarch64__)
    const __fp16 rounded = __fp16(f);
    uint16_t h;
    memcpy(&h, &rounded, sizeof h);
    return h;
#else
    const uint32_t u = as_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00);                                      // rounds to infinity
    if (a < 0x38800000u) return uint16_t(sign | (as_bits(as_float(a) + 0.5f) - 0x3f000000u));  // subnormal
    return uint16_t(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000u) >> 13));
#endif
}

inline float load_one(const void* p, int64_t i, DType dtype) {
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    const uint16_t h = static_cast<const uint16_t*>(p)[i];
    return dtype == DType::bf16 ? from_bf16(h) : from_f16(h);
}

inline void store_one(void* p, int64_t i, float v, DType dtype) {
    if (dtype == DType::f32) {
        static_cast<float*>(p)[i] = v;
    } else {
        static_cast<uint16_t*>(p)[i] = dtype == DType::bf16 ? to_bf16(v) : to_f16(v);
    }
}

}  // namespace
}  // namespace hf_spqr
