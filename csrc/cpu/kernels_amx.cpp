#include "cpu/amx.h"

namespace hf_spqr {
namespace {

bool in_tiles(const Matrix& m, DType dtype, int64_t tokens) {
    return dtype == DType::bf16 && has_prompt_amx(m, tokens);
}

int64_t planes_bytes(const Matrix& m, DType dtype, int64_t tokens) {
    return in_tiles(m, dtype, tokens) ? tokens_bytes_amx(m, tokens) : bf16_kernels().planes_bytes(m, dtype, tokens);
}

void prepare(const PrepareArgs& a, int64_t first, int64_t last) {
    (in_tiles(*a.weight, a.dtype, a.tokens) ? prepare_prompt_amx : bf16_kernels().prepare)(a, first, last);
}

void linear(const LinearArgs& a, int64_t first, int64_t last) {
    (in_tiles(a.weight, a.dtype, a.tokens) ? prompt_amx : bf16_kernels().linear)(a, first, last);
}

int64_t prepared_bytes(const Matrix& m, int64_t tokens) {
    return (has_integer_amx(m, tokens) ? prepared_bytes_amx : kVnniIntegers.prepared_bytes)(m, tokens);
}

void prepare_integers(const IntegerArgs& a, int64_t first, int64_t last) {
    (has_integer_amx(a.weight, a.tokens) ? prepare_integer_amx : kVnniIntegers.prepare)(a, first, last);
}

void integer_linear(const IntegerArgs& a, int64_t first, int64_t last) {
    (has_integer_amx(a.weight, a.tokens) ? integer_linear_amx : kVnniIntegers.linear)(a, first, last);
}

// Tiles take their part first.
bool takes_rounded(const Matrix& m, DType dtype, int64_t tokens) {
    return !in_tiles(m, dtype, tokens) && kVnniRounded.takes(m, dtype, tokens);
}

}  // namespace

const Kernels& amx_kernels() {
    static const IntegerKernels integers = {kVnniIntegers.quantize, prepared_bytes, prepare_integers, integer_linear};
    const Kernels& b = bf16_kernels();
    static const RoundedKernels rounded = {takes_rounded, kVnniRounded.bytes, kVnniRounded.prepare,
                                           kVnniRounded.linear};
    static const Kernels kernels = {planes_bytes, b.takes_fp32, b.takes_prompts, prepare, linear,
                                    b.dequantize, b.read,       integers,        &rounded};
    return kernels;
}

}  // namespace hf_spqr
