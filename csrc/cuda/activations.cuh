// What happens to activations before and after the multiplication.
#pragma once
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/store.cuh"

namespace hf_spqr {

constexpr int kPrepareThreads = 256;
constexpr int kFinishThreads = 256;

// One block per token. fp16 is only reordered and padded; bf16 and fp32 are scaled by a power of two so that the
// largest |x| lands in [16, 32): nothing overflows, and what is 2^19 times smaller still has all its bits.
static HF_KERNEL(kPrepareThreads, 1) prepare_kernel(const PrepareArgs a) {
    dev::let_next_kernel_start();
    uint32_t* warp_max = reinterpret_cast<uint32_t*>(dev::shared_memory());
    const int64_t token = dev::block_x(), from = token * a.columns, to = token * a.x_stride;
    float up = 1.f;
    if (a.dtype != DType::f16) {
        float largest = 0.f;
        for (int i = dev::thread(); i < a.columns; i += kPrepareThreads) {
            largest = fmaxf(largest, fabsf(read_as(a.x, from + i, a.dtype)));
        }
        const uint32_t of_warp = dev::max_of_warp(dev::as_bits(largest));
        if (dev::thread() % 32 == 0) warp_max[dev::thread() / 32] = of_warp;
        dev::sync_block();
        uint32_t bits = 0;
        for (int w = 0; w < kPrepareThreads / 32; ++w) bits = warp_max[w] > bits ? warp_max[w] : bits;
        const uint32_t e = bits >> 23, exponent = e < 5 ? 5 : e > 253 ? 253 : e;
        up = dev::as_float((258 - exponent) << 23);
        if (dev::thread() == 0) a.token_scale[token] = dev::as_float((exponent - 4) << 23);
    }
    for (int i = dev::thread(); i < a.x_stride; i += kPrepareThreads) {
        float v = 0.f;
        if (i < a.columns) v = dev::mul(read_as(a.x, from + (a.perm ? a.perm[i] : i), a.dtype), up);
        write_as(a.out, to + i, DType::f16, v);
    }
}

constexpr int kTransposeColumns = 64, kTransposeThreads = 256;

// Grid: x = stretches of 64 columns.
static HF_KERNEL(kTransposeThreads, 1) transpose_kernel(const TransposeArgs a) {
    constexpr int kRow = kLinearTokens + 2;  // halves of a column in shared memory: columns meet in no bank
    uint16_t* tile = reinterpret_cast<uint16_t*>(dev::shared_memory());
    const int64_t first = dev::block_x() * kTransposeColumns;
    for (int i = dev::thread(); i < kTransposeColumns * kLinearTokens; i += kTransposeThreads) {
        const int column = i % kTransposeColumns, token = i / kTransposeColumns;
        const bool there = token < a.tokens && first + column < a.columns;
        tile[column * kRow + token] = there ? a.x[token * a.x_stride + first + column] : uint16_t(0);
    }
    dev::sync_block();
    for (int i = dev::thread(); i < kTransposeColumns * kLinearTokens; i += kTransposeThreads) {
        const int column = i / kLinearTokens, token = i % kLinearTokens;
        if (first + column < a.columns) a.out[(first + column) * kLinearTokens + token] = tile[column * kRow + token];
    }
}

HF_DEVICE void finish_row(const FinishArgs& a, int64_t token, int64_t r) {
    float y = read_as(a.product, token * a.product_stride + r, a.product_dtype);
    for (int64_t part = 1; part < a.parts; ++part) {
        y = dev::add(y, read_as(a.product, (part * a.tokens + token) * a.product_stride + r, a.product_dtype));
    }
    if (a.token_scale) y = dev::mul(y, a.token_scale[token]);
    if (a.bias) y = dev::add(y, read_as(a.bias, a.first_row + r, a.dtype));
    write_as(a.y, token * a.rows + a.first_row + r, a.dtype, y);
}

// Grid: x = tokens, y = stretches of kFinishThreads rows of the part, or as many of them as a grid can have.
static HF_KERNEL(kFinishThreads, 1) finish_kernel(const FinishArgs a) {
    dev::wait_for_kernel();
    for (int64_t r = dev::block_y() * kFinishThreads + dev::thread(); r < a.part_rows;
         r += int64_t(kMaxGridY) * kFinishThreads) {
        finish_row(a, dev::block_x(), r);
    }
}

}  // namespace hf_spqr
