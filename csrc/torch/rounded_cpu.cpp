#include "torch/rounded_cpu.h"
#include "cpu/kernels.h"
#include "torch/split_cpu.h"

namespace hf_spqr {

namespace stable = torch::stable;

bool takes_rounded(const Matrix& m, DType dtype, int64_t tokens) {
    const RoundedKernels* k = kernels().rounded;
    return k && k->takes(m, dtype, tokens);
}

void linear_rounded(const Tensor& x, const Matrix& m, const int32_t* order, const void* bias, DType dtype, Tensor& y) {
    const RoundedKernels& k = *kernels().rounded;
    const int64_t tokens = x.size(0), size = dtype == DType::f32 ? 4 : 2;
    const int64_t at_once = ceil_div(tokens, ceil_div(tokens, kPromptTokens));
    Tensor memory = stable::new_empty(x, {k.bytes(m, at_once)}, ScalarType::Byte);
    char* planes = static_cast<char*>(memory.mutable_data_ptr());
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(y.mutable_data_ptr());
    for (int64_t done = 0; done < tokens; done += at_once) {
        const int64_t here = std::min(at_once, tokens - done);
        const PrepareArgs prepare{
            from + done * m.columns * size, m.columns, dtype, order, m.columns, 0, nullptr, 0, &m, here, planes};
        stable::parallel_for(0, ceil_div(here, kPrepareTokens), 1, [&](int64_t first, int64_t last) {
            k.prepare(prepare, first * kPrepareTokens, std::min(here, last * kPrepareTokens));
        });
        const LinearArgs args{m, nullptr, 0, planes, int(here), bias, to + done * m.rows * size, m.rows, dtype};
        over_row_blocks(m, [&](int64_t first, int64_t last) { k.linear(args, first, last); });
    }
}

}  // namespace hf_spqr
