#include "cpu/bf16.h"
#include "cpu/halves.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

// Tokens up to which the VNNI kernels are faster; where groups are shorter than a tile, and where not.
int64_t most_vnni(const Matrix& m) {
    const bool short_groups = plane_block(m) < kColumns;
    return has_gemv_vnni(m) ? (short_groups ? 6 : kMostFew) : (short_groups ? 1 : 6);
}

bool in_halves(const Matrix& m, DType dtype, int64_t tokens) {
    return dtype == DType::bf16 && tokens > most_vnni(m);
}

int64_t planes_bytes(const Matrix& m, DType dtype, int64_t tokens) {
    return in_halves(m, dtype, tokens) ? halves_bytes(m, tokens) : kVnniKernels.planes_bytes(m, dtype, tokens);
}

bool takes_fp32(const Matrix& m, DType dtype, int64_t tokens) {
    return !in_halves(m, dtype, tokens);
}

bool takes_prompts(DType dtype) {
    return dtype == DType::bf16;
}

void prepare(const PrepareArgs& a, int64_t first, int64_t last) {
    (in_halves(*a.weight, a.dtype, a.tokens) ? prepare_halves : kVnniKernels.prepare)(a, first, last);
}

void linear(const LinearArgs& a, int64_t first, int64_t last) {
    if (!in_halves(a.weight, a.dtype, a.tokens)) {
        kVnniKernels.linear(a, first, last);
    } else if (rounds_weights(a.weight, a.tokens)) {
        prefill_bf16(a, first, last);
    } else {
        batch_bf16(a, first, last);
    }
}

}  // namespace

const Kernels& bf16_kernels() {
    static const Kernels kernels = {planes_bytes,    takes_fp32,        takes_prompts,         prepare,      linear,
                                    dequantize_bf16, kVnniKernels.read, kVnniKernels.integers, &kVnniRounded};
    return kernels;
}

}  // namespace hf_spqr
