// The kernels of one instruction set, and the choice between them.
#pragma once
#include "cpu/integer.h"
#include "cpu/matrix.h"

namespace hf_spqr {

constexpr int kMaxTokens = 64;      // of one call of a linear kernel
constexpr int kPromptTokens = 512;  // of one call where takes_prompts
constexpr int kPrepareTokens = 16;  // which prepare takes together

// out[tokens, padded_columns] = fp32 x, columns in stored order (stored column j is original column perm[j]).
struct PrepareArgs {
    const void* x;
    int64_t x_stride;
    DType dtype;
    const int32_t* perm;  // or null
    int64_t columns, padded_columns;
    float* out;
    int64_t out_stride;
    const Matrix* weight;
    int64_t tokens;
    char* planes;  // of all tokens: integer form of x, where the kernels want one
};

// A linear layer whose activations are rounded to int8 first (token_blocks.h), where that is allowed and faster.
struct RoundedKernels {
    bool (*takes)(const Matrix&, DType, int64_t tokens);
    // Of memory at `planes`, for at most kPromptTokens tokens.
    int64_t (*bytes)(const Matrix&, int64_t tokens);
    // As in Kernels, but that nothing is wanted or given at `out` and `x`, and linear takes kPromptTokens tokens.
    void (*prepare)(const PrepareArgs&, int64_t first, int64_t last);
    void (*linear)(const LinearArgs&, int64_t first, int64_t last);
};

struct Kernels {
    // Bytes of x in the form of the kernels; null where they take it in fp32.
    int64_t (*planes_bytes)(const Matrix&, DType, int64_t tokens);
    // Whether x is prepared in fp32, beside that form or alone; null: always.
    bool (*takes_fp32)(const Matrix&, DType, int64_t tokens);
    // Whether linear is also the fastest way for more tokens than kMaxTokens, kPromptTokens at a time; null: never.
    // The accuracy is then that of a product in their dtype.
    bool (*takes_prompts)(DType);
    // Activations, for tokens [first, last); first is a multiple of kPrepareTokens.
    void (*prepare)(const PrepareArgs&, int64_t first, int64_t last);
    // Row blocks [first, last), at most kMaxTokens tokens, or kPromptTokens where takes_prompts.
    void (*linear)(const LinearArgs&, int64_t first, int64_t last);
    // Row blocks [first, last); out is where row block `first` begins.
    void (*dequantize)(const DequantizeArgs&, int64_t first, int64_t last);
    // Exclusive or over words (a multiple of 64 of them): what a plain read of memory costs.
    uint32_t (*read)(const uint32_t*, int64_t words);
    const IntegerKernels& integers;
    const RoundedKernels* rounded = nullptr;  // or null
};

extern const Kernels kBaseKernels;  // of what every processor of the architecture has
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kVnniKernels;  // AVX-512 with VNNI and VBMI
extern const RoundedKernels kVnniRounded;
const Kernels& bf16_kernels();  // the same with BF16
const Kernels& amx_kernels();   // the same with AMX tiles of bf16 and int8
#elif defined(__aarch64__)
extern const Kernels kDotprodKernels;  // NEON with integer dot products
#endif

#if defined(__aarch64__)
enum class Isa : int { neon = 0, neon_dotprod = 1 };
constexpr int kIsaCount = 2;
#else
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, avx512_bf16 = 4, amx = 5 };
constexpr int kIsaCount = 6;
#endif
const char* isa_name(Isa);
Isa best_isa();            // of this machine
Isa current_isa();         // best_isa() unless lowered
bool lower_isa(Isa);       // false when the machine does not have it
const Kernels& kernels();  // of current_isa()

}  // namespace hf_spqr
