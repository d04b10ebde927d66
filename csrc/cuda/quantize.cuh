// Activations as integers, one grid per token (hf_spqr/formats/tokens.py): equal to the PyTorch reference to the last
// bit, every step being one fp32 operation, rounded, in its order.
#pragma once
#include "cuda/kernels.h"
#include "cuda/store.cuh"

namespace hf_spqr {

constexpr int kQuantizeThreads = 256, kQuantizeThreadsOfFew = 1024;
constexpr float kMinScale = 1e-5f;
constexpr int kQuantizeVector = 8;  // columns of a thread at a time
constexpr int kQuantizeKept = 2;    // of these, kept in registers from looking for the range to writing the codes

// Eight numbers, from an address aligned to 16 bytes.
HF_DEVICE void read_eight(float (&v)[kQuantizeVector], const void* p, int64_t i, DType dtype) {
    if (dtype == DType::f32) {
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const float*>(p) + i);
        const uint4 a = from[0], b = from[1];
        const uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = dev::as_float(w[j]);
    } else {
        const uint4 a = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + i);
        const uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            v[2 * j] = dtype == DType::bf16 ? dev::as_float(w[j] << 16) : dev::low_float(w[j]);
            v[2 * j + 1] = dtype == DType::bf16 ? dev::as_float(w[j] & 0xffff0000u) : dev::high_float(w[j]);
        }
    }
}

// The largest x and the largest -x of a token, at least 0, as bits: the bits of positive floats are in the order of
// their values, and those of a NaN come after all of them.
struct Range {
    int high = 0, low = 0;

    HF_DEVICE void add(float v) {
        const uint32_t bits = dev::as_bits(v);
        const int up = int(bits), down = int(bits ^ 0x80000000u);
        high = up > high ? up : high;
        low = down > low ? down : low;
    }

    HF_DEVICE void add(const float (&v)[kQuantizeVector]) {
#pragma unroll
        for (int j = 0; j < kQuantizeVector; ++j) add(v[j]);
    }

    // Of the whole block of `warps` warps.
    HF_DEVICE void gather(int warps) {
        uint32_t* shared = reinterpret_cast<uint32_t*>(dev::shared_memory());
        const uint32_t h = dev::max_of_warp(uint32_t(high)), l = dev::max_of_warp(uint32_t(low));
        if (dev::thread() % 32 == 0) {
            shared[dev::thread() / 32] = h;
            shared[warps + dev::thread() / 32] = l;
        }
        dev::sync_block();
        uint32_t most[2] = {};
        for (int w = 0; w < 2 * warps; ++w)
            most[w / warps] = shared[w] > most[w / warps] ? shared[w] : most[w / warps];
        high = int(most[0]);
        low = int(most[1]);
    }
};

// A token's grid, and codes on it.
class Grid8 {
  public:
    HF_DEVICE Grid8(const Range& range, int bits, bool symmetric) {
        const float high = dev::as_float(uint32_t(range.high)), low = dev::as_float(uint32_t(range.low));
        const int half = 1 << (bits - 1);
        const float spread = symmetric ? (range.high > range.low ? high : low) : dev::add(high, low);
        good_ = (dev::as_bits(spread) & 0x7fffffffu) < 0x7f800000u;
        const float steps = float(symmetric ? half - 1 : 2 * half - 1);
        scale_ = good_ ? fmaxf(dev::div(spread, steps), kMinScale) : dev::as_float(0x7fc00000u);
        shift_ = symmetric ? 0.f : float(half);
        zero_ = symmetric || !good_ ? 0.f : dev::round_even(dev::div(low, scale_));
        least_ = symmetric ? float(1 - half) : 0.f;
        most_ = steps;
    }

    HF_DEVICE int code(float v) const {
        const float q = dev::add(dev::round_even(dev::div(v, scale_)), zero_);
        return good_ ? int(fminf(fmaxf(q, least_), most_) - shift_) : 0;
    }
    HF_DEVICE float scale() const { return scale_; }
    HF_DEVICE int zero() const { return good_ ? int(zero_ - shift_) : 0; }

  private:
    bool good_;
    float scale_, zero_, shift_, least_, most_;
};

HF_DEVICE void write_grid(const QuantizeArgs& a, int64_t token, const Grid8& grid) {
    if (dev::thread() != 0) return;
    a.scale[token] = grid.scale();
    a.zero[token] = grid.zero();
}

HF_DEVICE void write_eight(int8_t* to, const float (&v)[kQuantizeVector], const Grid8& grid) {
    uint32_t w[2] = {};
#pragma unroll
    for (int j = 0; j < kQuantizeVector; ++j) w[j / 4] |= uint32_t(grid.code(v[j]) & 255) << 8 * (j % 4);
    *reinterpret_cast<uint2*>(to) = make_uint2(w[0], w[1]);
}

// One block per token; rows of whole vectors, aligned, in order.
template <int THREADS>
HF_KERNEL(THREADS, 1)
quantize_vectors_kernel(const QuantizeArgs a) {
    constexpr int kStride = THREADS * kQuantizeVector;
    const int64_t token = dev::block_x(), from = token * a.columns;
    const int first = dev::thread() * kQuantizeVector;
    Range range;
    float kept[kQuantizeKept][kQuantizeVector], v[kQuantizeVector];
#pragma unroll
    for (int i = 0; i < kQuantizeKept; ++i) {
        if (first + i * kStride < a.columns) read_eight(kept[i], a.x, from + first + i * kStride, a.dtype);
    }
    for (int c = first + kQuantizeKept * kStride; c < a.columns; c += kStride) {
        read_eight(v, a.x, from + c, a.dtype);
        range.add(v);
    }
#pragma unroll
    for (int i = 0; i < kQuantizeKept; ++i) {
        if (first + i * kStride < a.columns) range.add(kept[i]);
    }
    range.gather(THREADS / 32);
    const Grid8 grid(range, a.bits, a.symmetric);
    write_grid(a, token, grid);
#pragma unroll
    for (int i = 0; i < kQuantizeKept; ++i) {
        if (first + i * kStride < a.columns) write_eight(a.code + from + first + i * kStride, kept[i], grid);
    }
    for (int c = first + kQuantizeKept * kStride; c < a.columns; c += kStride) {
        read_eight(v, a.x, from + c, a.dtype);
        write_eight(a.code + from + c, v, grid);
    }
}

// One block per token; any columns, in any order.
static HF_KERNEL(kQuantizeThreads, 1) quantize_kernel(const QuantizeArgs a) {
    const int64_t token = dev::block_x(), from = token * a.columns;
    Range range;
    for (int i = dev::thread(); i < a.columns; i += kQuantizeThreads) range.add(read_as(a.x, from + i, a.dtype));
    range.gather(kQuantizeThreads / 32);
    const Grid8 grid(range, a.bits, a.symmetric);
    write_grid(a, token, grid);
    for (int i = dev::thread(); i < a.columns; i += kQuantizeThreads) {
        a.code[from + i] = int8_t(grid.code(read_as(a.x, from + (a.perm ? a.perm[i] : i), a.dtype)));
    }
}

constexpr int kPadThreads = 256;

// Grid: x = tokens.
static HF_KERNEL(kPadThreads, 1) pad_kernel(const PadArgs a) {
    const int64_t token = dev::block_x();
    for (int i = dev::thread(); i < a.stride; i += kPadThreads) {
        a.out[token * a.stride + i] = i < a.columns ? a.x[token * a.columns + i] : 0;
    }
}

}  // namespace hf_spqr
