// Activations to integers, one grid per token. Internal linkage (see vec.h).
#pragma once
#include "cpu/integer.h"
#include "cpu/vec.h"

namespace hf_spqr {
namespace {

typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef int8_t VecB __attribute__((vector_size(kLanes)));

inline VecF load_halves(const uint16_t* p, DType dtype) {
    VecH h;
    memcpy(&h, p, sizeof h);
    if (dtype == DType::bf16) return (VecF)(__builtin_convertvector(h, VecU) << 16);
#if defined(__AVX512F__)
    return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (VecF)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (VecF)vcvt_f32_f16((float16x4_t)h);
#else
    VecF v;
    for (int i = 0; i < kLanes; ++i) v[i] = from_f16(h[i]);
    return v;
#endif
}

// Columns k .. k + kLanes of a token in stored order; zeros after the last column.
template <DType D>
inline VecF load_x(const void* x, const int32_t* perm, int64_t k, int64_t columns) {
    if (perm == nullptr && k + kLanes <= columns) {
        if constexpr (D == DType::f32) return load(static_cast<const float*>(x) + k);
        return load_halves(static_cast<const uint16_t*>(x) + k, D);
    }
    VecF v{};
    for (int i = 0; i < kLanes && k + i < columns; ++i) v[i] = load_one(x, perm ? perm[k + i] : k + i, D);
    return v;
}

// To nearest even, for |v| below 2^22.
inline VecF round_even(VecF v) {
    return (v + 0x1.8p23f) - 0x1.8p23f;
}

struct Grid {
    float scale, zero;  // zero counts from the lowest code
    bool finite;
};

template <DType D>
Grid grid_of(const void* x, int64_t columns, int bits, bool symmetric) {
    VecF low{}, high{};
    VecU bad{};
    for (int64_t k = 0; k < columns; k += kLanes) {
        const VecF v = load_x<D>(x, nullptr, k, columns);  // the padding is zero, which the range holds anyway
        low = v < low ? v : low;
        high = v > high ? v : high;
        bad |= (VecU)(v - v);  // zero but for NaN and infinity
    }
    float least = 0.f, most = 0.f;
    uint32_t any_bad = 0;
    for (int i = 0; i < kLanes; ++i) {
        least = low[i] < least ? low[i] : least;
        most = high[i] > most ? high[i] : most;
        any_bad |= bad[i];
    }
    const float spread = !symmetric ? most - least : most > -least ? most : -least;
    const float scale = spread / float(symmetric ? (1 << (bits - 1)) - 1 : (1 << bits) - 1);
    const Grid grid{scale > 1e-5f ? scale : 1e-5f, 0.f, !any_bad && spread <= 3.4028235e38f};
    if (symmetric) return grid;
    return {grid.scale, round_even(VecF{} + -least / grid.scale)[0], grid.finite};
}

template <DType D>
void quantize_token(const QuantizeArgs& a, int64_t t) {
    const void* x = static_cast<const char*>(a.x) + t * a.columns * (D == DType::f32 ? 4 : 2);
    int8_t* code = a.code + t * a.columns;
    const Grid grid = grid_of<D>(x, a.columns, a.bits, a.symmetric);
    const int half = 1 << (a.bits - 1);
    if (!grid.finite) {
        memset(code, 0, a.columns);
        a.scale[t] = as_float(0x7fc00000u);
        a.zero[t] = 0;
        return;
    }
    a.scale[t] = grid.scale;
    a.zero[t] = a.symmetric ? 0 : int(grid.zero) - half;
    const VecF scale = splat(grid.scale), zero = splat(grid.zero);
    const VecF lowest = splat(a.symmetric ? float(1 - half) : 0.f);
    const VecF highest = splat(a.symmetric ? float(half - 1) : float(2 * half - 1));
    const VecI shift = VecI{} + (a.symmetric ? 0 : half);
    for (int64_t k = 0; k < a.columns; k += kLanes) {
        VecF q = round_even(load_x<D>(x, a.perm, k, a.columns) / scale) + zero;
        q = q < lowest ? lowest : q;
        q = q > highest ? highest : q;
        const VecB bytes = __builtin_convertvector(__builtin_convertvector(q, VecI) - shift, VecB);
        const int64_t left = a.columns - k;
        memcpy(code + k, &bytes, left < kLanes ? left : kLanes);
    }
}

inline void quantize(const QuantizeArgs& a, int64_t first, int64_t last) {
    const auto token = a.dtype == DType::f32    ? quantize_token<DType::f32>
                       : a.dtype == DType::bf16 ? quantize_token<DType::bf16>
                                                : quantize_token<DType::f16>;
    for (int64_t t = first; t < last; ++t) token(a, t);
}

}  // namespace
}  // namespace hf_spqr
