// Linear layers whose activations are integers too, and how activations become integers. hf_spqr/ops/reference.py says
// what both compute, to the last bit.
#pragma once
#include "cpu/matrix.h"

namespace hf_spqr {

// x[tokens, K] to codes in the stored order of columns (stored column j is column perm[j]).
struct QuantizeArgs {
    const void* x;
    DType dtype;
    const int32_t* perm;  // or null
    int64_t columns;
    int bits;
    bool symmetric;
    int8_t* code;   // [tokens, K]
    float* scale;   // [tokens]
    int32_t* zero;  // [tokens]
};

// y[tokens, N] = scale (code - zero) times the rows of an affine matrix, plus bias.
struct IntegerArgs {
    Matrix weight;
    const int8_t* code;  // [tokens, K]
    const float* scale;
    const int32_t* zero;
    int64_t tokens;
    char* prepared;    // prepared_bytes of memory
    const void* bias;  // of dtype, or null
    void* y;
    DType dtype;
};

struct IntegerKernels {
    // Tokens [first, last).
    void (*quantize)(const QuantizeArgs&, int64_t first, int64_t last);
    // What `linear` wants beside the codes: its size, and the part of tokens [first, last).
    int64_t (*prepared_bytes)(const Matrix&, int64_t tokens);
    void (*prepare)(const IntegerArgs&, int64_t first, int64_t last);
    // Row blocks [first, last).
    void (*linear)(const IntegerArgs&, int64_t first, int64_t last);
};

extern const IntegerKernels kBaseIntegers;
#if defined(__x86_64__)
extern const IntegerKernels kAvx2Integers;
extern const IntegerKernels kAvx512Integers;
extern const IntegerKernels kVnniIntegers;
#elif defined(__aarch64__)
extern const IntegerKernels kDotprodIntegers;
#endif

}  // namespace hf_spqr
