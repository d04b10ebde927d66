#include "cpu/kernels.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

void prepare(const PrepareArgs& a, int64_t first, int64_t last) {
    kAvx512Kernels.prepare(a, first, last);
    for (int64_t t = first; t < last; ++t) {
        split_planes_vnni(*a.weight, a.out + t * a.out_stride, t, a.tokens, a.planes);
    }
}

void linear(const LinearArgs& a, int64_t first, int64_t last) {
    if (a.tokens == 1 && has_gemv_spqr_vnni(a.weight)) {
        gemv_spqr_vnni(a, first, last);
    } else if (a.tokens == 1 && has_gemv_vnni(a.weight)) {
        gemv_vnni(a, first, last);
    } else {
        batch_vnni(a, first, last);
    }
}

void dequantize(const DequantizeArgs& a, int64_t first, int64_t last) {
    kAvx512Kernels.dequantize(a, first, last);
}

uint32_t read(const uint32_t* p, int64_t words) {
    return kAvx512Kernels.read(p, words);
}

}  // namespace

extern const Kernels kVnniKernels = {planes_bytes_vnni, nullptr, nullptr,      prepare, linear,
                                     dequantize,        read,    kVnniIntegers};

}  // namespace hf_spqr
