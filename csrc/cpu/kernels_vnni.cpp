#include "cpu/kernels.h"
#include "cpu/planes.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

bool few(const Matrix& m, int64_t tokens) {
    return tokens <= kMostFew && has_gemv_vnni(m);
}

int64_t planes_bytes(const Matrix& m, DType, int64_t tokens) {
    return few(m, tokens) ? few_bytes_vnni(m, tokens) : batch_bytes_vnni(m, tokens);
}

void prepare(const PrepareArgs& a, int64_t first, int64_t last) {
    if (!few(*a.weight, a.tokens)) return prepare_batch_vnni(a, first, last);
    kAvx512Kernels.prepare(a, first, last);
    prepare_few_vnni(*a.weight, a.out, a.out_stride, a.tokens, a.planes);
}

void linear(const LinearArgs& a, int64_t first, int64_t last) {
    if (!few(a.weight, a.tokens)) {
        batch_vnni(a, first, last);
    } else if (has_gemv_spqr_vnni(a.weight)) {
        gemv_spqr_vnni(a, first, last);
    } else {
        gemv_vnni(a, first, last);
    }
}

void dequantize(const DequantizeArgs& a, int64_t first, int64_t last) {
    kAvx512Kernels.dequantize(a, first, last);
}

uint32_t read(const uint32_t* p, int64_t words) {
    return kAvx512Kernels.read(p, words);
}

}  // namespace

extern const Kernels kVnniKernels = {planes_bytes, nullptr, nullptr,       prepare,      linear,
                                     dequantize,   read,    kVnniIntegers, &kVnniRounded};

}  // namespace hf_spqr
