// The launches: what csrc/torch calls. Plain C, no torch, no CUDA header. Every function returns the cudaError_t of
// its launch (0 = success), never waits, never allocates, and runs on the current device in `stream`.
#pragma once
#include "cuda/matrix.h"

namespace hf_spqr {

constexpr int kLinearTokens = 16;      // of linear.cuh
constexpr int kTiledTokens = 128;      // of tiled.cuh
constexpr int kFewIntegerTokens = 64;  // from here on w_int8_linear takes larger tiles

// y[tokens, rows] = x W^T + bias, W with outliers. x is what `prepare` writes, or an fp16 matrix like it.
struct LinearArgs {
    Matrix weight;
    const uint16_t* x;  // fp16 [tokens, x_stride], stored order of columns, 16-byte aligned rows, zeros past the end
    int64_t x_stride;   // a multiple of 8, at least columns
    const float* token_scale;  // [tokens], a row of x stands for x * token_scale; null = 1
    int tokens;
    const void* bias;  // [rows] of dtype, or null
    void* y;           // [tokens, rows] of dtype
    DType dtype;
    const uint16_t* x_columns;  // x by columns for the outliers, as `transpose` writes it; null without outliers
};

// How x goes through shared memory in the kernel for few tokens; filled in by its launch.
struct ResidentPlan {
    int chunk_columns;  // of x in shared memory at a time, a multiple of 256
    bool vectors;       // x can be read 16 bytes at a time, in order
};

// The same product for few tokens, from x as it was given.
struct ResidentArgs {
    Matrix weight;
    const void* x;        // [tokens, columns] of dtype
    const int32_t* perm;  // stored column j is column perm[j] of x; or null
    const void* bias;     // [rows] of dtype, or null
    void* y;              // [tokens, rows] of dtype
    DType dtype;
    int tokens;
    ResidentPlan plan;
};

// sums[part][token][row] of W x, rows padded to a multiple of 16: what `finish` adds up. x and token_scale as in
// LinearArgs.
struct TiledArgs {
    Matrix weight;
    const uint16_t* x;
    int64_t x_stride;
    const float* token_scale;
    int tokens;
    int parts;  // of the columns, as `tiled_parts` says
    float* sums;
};

constexpr int kNoKernel = -1;  // instead of an error: this matrix, number of tokens or device is not served

// x [tokens, columns] of any dtype to fp16 in stored order; rows padded with zeros to x_stride. bf16 and fp32 are
// scaled per token by a power of two so that nothing overflows.
struct PrepareArgs {
    const void* x;
    DType dtype;
    const int32_t* perm;  // stored column j is original column perm[j]; or null
    int tokens, columns;
    uint16_t* out;
    int64_t x_stride;
    float* token_scale;  // [tokens]; not written for fp16
};

// x [tokens, columns] fp16 to out [columns, kLinearTokens], zeros past the tokens.
struct TransposeArgs {
    const uint16_t* x;
    int64_t x_stride;
    int tokens, columns;
    uint16_t* out;
};

// y[token, first_row + r] = (sum over parts of product[part, token, r]) * token_scale[token] + bias[first_row + r]
struct FinishArgs {
    const void* product;  // [parts, tokens, product_stride] of product_dtype
    DType product_dtype;
    int parts;
    int64_t product_stride;
    int part_rows, first_row, rows, tokens;
    const float* token_scale;  // or null
    const void* bias;          // [rows] of dtype, or null
    void* y;                   // [tokens, rows] of dtype
    DType dtype;
};

// Rows [first_row, first_row + part_rows) of the dense matrix, outliers included; out points at first_row's. first_row
// is a multiple of 16. With perm, stored column j goes to column perm[j].
struct DequantizeArgs {
    Matrix weight;
    const int32_t* perm;
    int first_row, part_rows;
    void* out;
    int64_t out_stride;
    DType dtype;
    int first_stretch;  // of columns; filled in by the launch
};

// Codes of x [tokens, columns], one grid per token: x ~ scale * (code - zero).
struct QuantizeArgs {
    const void* x;
    DType dtype;
    const int32_t* perm;  // stored column j is original column perm[j]; or null
    int tokens, columns, bits;
    bool symmetric;
    int8_t* code;  // [tokens, columns]
    float* scale;  // [tokens]
    int32_t* zero;
};

// y[tokens, rows] = x W^T + bias in integers, x given by its codes.
struct Int8Args {
    Matrix weight;       // affine
    const int8_t* x;     // [tokens, x_stride], 16-byte aligned rows, zeros past the end
    int64_t x_stride;    // bytes, a multiple of 16, for at least `columns`
    const float* scale;  // [tokens]
    const int32_t* zero;
    int tokens;
    const void* bias;  // [rows] of dtype, or null
    void* y;           // [tokens, rows] of dtype
    DType dtype;
    bool half_bytes;  // x is what `pack_half_bytes` writes, as `takes_half_bytes` asked
};

// Rows of `columns` bytes to rows of `stride`, filled up with zeros; or to half bytes, `stride` a multiple of 16 too.
struct PadArgs {
    const int8_t* x;
    int tokens, columns;
    int8_t* out;
    int64_t stride;
};

extern "C" {
// 1 when `hf_spqr_cuda_linear` has a kernel for this matrix and number of tokens; by shape only.
int hf_spqr_cuda_can_fuse(const Matrix*, int tokens);
// Sets *parts to those of `hf_spqr_cuda_linear_tiled` for this matrix and number of tokens on the current device; 0
// where it has no kernel.
int hf_spqr_cuda_tiled_parts(const Matrix*, int tokens, int* parts);
int hf_spqr_cuda_linear_tiled(const TiledArgs*, void* stream);
int hf_spqr_cuda_linear(const LinearArgs*, void* stream);
// The fastest way for up to 16 tokens of most matrices; kNoKernel where it is not to be had. Leaves `plan` alone.
int hf_spqr_cuda_linear_resident(const ResidentArgs*, void* stream);
int hf_spqr_cuda_prepare(const PrepareArgs*, void* stream);
int hf_spqr_cuda_transpose(const TransposeArgs*, void* stream);
int hf_spqr_cuda_finish(const FinishArgs*, void* stream);
int hf_spqr_cuda_dequantize(const DequantizeArgs*, void* stream);
int hf_spqr_cuda_quantize(const QuantizeArgs*, void* stream);
int hf_spqr_cuda_pad(const PadArgs*, void* stream);
// Sets *yes where `int8_linear` is faster with half bytes for x, whose codes have act_bits, on the current device.
int hf_spqr_cuda_takes_half_bytes(const Matrix*, int tokens, int act_bits, bool* yes);
int hf_spqr_cuda_pack_half_bytes(const PadArgs*, void* stream);
int hf_spqr_cuda_int8_linear(const Int8Args*, void* stream);
int hf_spqr_cuda_multiprocessors(int* count);  // of the current device
const char* hf_spqr_cuda_error(int status);
// 0, or the version of the driver if it is of an older generation than the CUDA runtime that is linked in.
int hf_spqr_cuda_old_driver(void);
}

}  // namespace hf_spqr
