// What a packed matrix is, as plain numbers and pointers. The bytes are specified in docs/format.md.
#pragma once
#include <cstdint>

namespace hf_spqr {

constexpr int kRows = 16;     // rows of a row block, and words of a vector
constexpr int kColumns = 32;  // columns of a tile

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Format : int { spqr = 0, affine = 1 };

struct Matrix {
    Format format;
    int bits;
    int group;              // columns that share a scale, per channel: kPerChannel
    int64_t rows, columns;  // N, K
    const uint32_t* packed;
    int64_t words;  // of a row block

    // SpQR
    int stat_bits;
    int groups_per_second;         // column groups that share a second level: 1 or 2
    const int32_t* outlier_row;    // [N + 1]
    const uint32_t* outlier;       // int32 entries: fp16 << 16 | column. Null when entries are int64
    const uint64_t* outlier_wide;  // int64 entries: fp16 << 32 | column

    // affine
    bool symmetric;
    bool scale_bf16;
};

constexpr int kPerChannel = -1;

// y[tokens, N] = x[tokens, K] W^T + bias. x is fp32 in the stored order of columns, zero padded to whole tiles.
struct LinearArgs {
    Matrix weight;
    const float* x;
    int64_t x_stride;
    char* planes;  // integer form of x, where the kernels want one
    int tokens;
    const void* bias;  // of dtype, or null
    void* y;
    int64_t y_stride;
    DType dtype;
};

// Rows of the dense matrix, row r of the first block at out. With perm, stored column j goes to column perm[j].
struct DequantizeArgs {
    Matrix weight;
    const int32_t* perm;
    void* out;
    int64_t out_stride;
    DType dtype;
};

}  // namespace hf_spqr
