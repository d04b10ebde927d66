#include "torch/linear_cpu.h"
#include <algorithm>
#include <array>
#include <vector>
#include <torch/csrc/stable/ops.h>
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "torch/split_cpu.h"

namespace hf_spqr {
namespace {

namespace stable = torch::stable;

constexpr int64_t kScratchBytes = 8 << 20;  // of dequantized weights

int64_t element_size(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
}

// A call of an op: x [tokens, K] and y [tokens, N], contiguous.
struct Call {
    const Tensor& x;
    const Matrix& m;
    const int32_t* perm;
    const void* bias;
    DType dtype;
    Tensor& y;
    int64_t tokens = x.size(0);
};

// Tokens of a call of the kernels, at most `most`: equal shares.
int64_t share_of(int64_t tokens, int64_t most) {
    return ceil_div(tokens, ceil_div(tokens, most));
}

// Prepares and multiplies `at_once` tokens after the other. prepared, planes: memory for what K's kernels ask.
template <class K>
void run(const Call& c, int64_t at_once, const K& kernels, float* prepared, char* planes) {
    const Matrix& m = c.m;
    const int64_t padded = ceil_div(m.columns, kColumns) * kColumns, size = element_size(c.dtype);
    const char* x = static_cast<const char*>(c.x.const_data_ptr());
    char* y = static_cast<char*>(c.y.mutable_data_ptr());
    for (int64_t done = 0; done < c.tokens; done += at_once) {
        const int64_t here = std::min(at_once, c.tokens - done);
        const PrepareArgs prepare{x + done * m.columns * size,
                                  m.columns,
                                  c.dtype,
                                  c.perm,
                                  m.columns,
                                  padded,
                                  prepared,
                                  padded,
                                  &m,
                                  here,
                                  planes};
        stable::parallel_for(0, ceil_div(here, kPrepareTokens), 1, [&](int64_t first, int64_t last) {
            kernels.prepare(prepare, first * kPrepareTokens, std::min(here, last * kPrepareTokens));
        });
        const LinearArgs args{m,      prepared, padded, planes, int(here), c.bias, y + done * m.rows * size,
                              m.rows, c.dtype};
        over_row_blocks(m, [&](int64_t first, int64_t last) { kernels.linear(args, first, last); });
    }
}

// Straight from the packed weights, at most so many tokens at a time.
void linear_packed(const Call& c, int64_t most) {
    const Kernels& k = kernels();
    const int64_t padded = ceil_div(c.m.columns, kColumns) * kColumns, at_once = share_of(c.tokens, most);
    const int64_t of_last = c.tokens - (ceil_div(c.tokens, at_once) - 1) * at_once;
    const auto fp32_bytes = [&](int64_t count) {
        return k.takes_fp32 && !k.takes_fp32(c.m, c.dtype, count) ? 0 : padded * 4 * count;
    };
    const int64_t x_bytes = std::max(fp32_bytes(at_once), fp32_bytes(of_last));
    const int64_t planes_bytes = k.planes_bytes ? k.planes_bytes(c.m, c.dtype, at_once) : 0;
    Tensor scratch = stable::new_empty(c.x, {x_bytes + planes_bytes}, ScalarType::Byte);
    char* memory = static_cast<char*>(scratch.mutable_data_ptr());
    run(c, at_once, k, reinterpret_cast<float*>(memory), memory + x_bytes);
}

// The same on activations rounded to int8.
void linear_rounded(const Call& c, const RoundedKernels& k) {
    const int64_t at_once = share_of(c.tokens, kPromptTokens);
    Tensor planes = stable::new_empty(c.x, {k.bytes(c.m, at_once)}, ScalarType::Byte);
    run(c, at_once, k, nullptr, static_cast<char*>(planes.mutable_data_ptr()));
}

// aten::linear; bias may be empty.
Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    std::array<StableIValue, 3> stack{stable::detail::from(x), stable::detail::from(weight),
                                      stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return stable::detail::to<Tensor>(stack[0]);
}

// y in another shape, and no view: autograd forbids to change a view in place that an op gives.
Tensor with_shape(const Tensor& y, const std::vector<int64_t>& shape) {
    std::array<StableIValue, 2> stack{stable::detail::from(y),
                                      stable::detail::from(torch::headeronly::IntHeaderOnlyArrayRef(shape))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_unsafe_view", "", stack.data(), TORCH_ABI_VERSION));
    return stable::detail::to<Tensor>(stack[0]);
}

Tensor select_columns(const Tensor& x, const Tensor& index) {
    std::array<StableIValue, 3> stack{stable::detail::from(x), stable::detail::from(int64_t(1)),
                                      stable::detail::from(index)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
    return stable::detail::to<Tensor>(stack[0]);
}

// Rows of row blocks [first, last) at out, in parallel.
void dequantize_rows(const Matrix& m, const int32_t* perm, void* out, int64_t first, int64_t last, DType dtype) {
    const Kernels& k = kernels();
    const int64_t grain = std::max<int64_t>(1, kBytesPerTask / (m.words * 4));
    stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
        const DequantizeArgs args{m, perm,
                                  static_cast<char*>(out) + (begin - first) * kRows * m.columns * element_size(dtype),
                                  m.columns, dtype};
        k.dequantize(args, begin, end);
    });
}

// By way of dense weights, some rows at a time.
Tensor linear_dense(Tensor x, const Matrix& m, const std::optional<Tensor>& perm, std::optional<Tensor> bias,
                    DType dtype) {
    // Half precision has no fast product on most processors: fp32, which is exact for its operands.
    const ScalarType out_dtype = x.scalar_type();
    const bool wide = dtype != DType::bf16;
    const ScalarType work_dtype = wide ? ScalarType::Float : ScalarType::BFloat16;
    if (perm) x = select_columns(x, *perm);
    if (dtype == DType::f16) {
        x = stable::to(x, ScalarType::Float);
        if (bias) bias = stable::to(*bias, ScalarType::Float);
    }
    const int64_t blocks = ceil_div(m.rows, kRows);
    const int64_t block_bytes = kRows * m.columns * (wide ? 4 : 2);
    const int64_t step = std::min(blocks, std::max<int64_t>(1, kScratchBytes / block_bytes));
    Tensor scratch = stable::new_empty(x, {step * kRows, m.columns}, work_dtype);
    std::optional<Tensor> y;
    for (int64_t first = 0; first < blocks; first += step) {
        const int64_t last = std::min(blocks, first + step);
        const int64_t row = first * kRows, rows = std::min(m.rows, last * kRows) - row;
        dequantize_rows(m, nullptr, scratch.mutable_data_ptr(), first, last, wide ? DType::f32 : DType::bf16);
        std::optional<Tensor> part_bias;
        if (bias) part_bias = stable::narrow(*bias, 0, row, rows);
        const Tensor part = torch_linear(x, stable::narrow(scratch, 0, 0, rows), part_bias);
        if (rows == m.rows && part.scalar_type() == out_dtype) return part;
        if (!y) y = stable::new_empty(x, {x.size(0), m.rows}, out_dtype);
        Tensor target = stable::narrow(*y, 1, row, rows);
        stable::copy_(target, part);
    }
    return *y;
}

}  // namespace

Tensor linear_cpu(const char* op, const Tensor& x, const Matrix& m, const std::optional<Tensor>& perm,
                  const std::optional<Tensor>& bias, bool int8_activations) {
    const DType dtype = float_dtype(op, "x", x.scalar_type());
    const int32_t* order = permutation(op, perm, m.columns);
    const void* bias_data = bias_pointer(op, bias, m.rows, x.scalar_type(), "the dtype of x");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = m.rows;
    const int64_t tokens = x.numel() / m.columns;
    if (tokens == 0) return stable::new_empty(x, shape);
    const Tensor flat = stable::reshape(stable::contiguous(x), {tokens, m.columns});
    const Kernels& k = kernels();
    const bool rounds = int8_activations && k.rounded && k.rounded->takes(m, dtype, tokens);
    const bool takes_prompts = k.takes_prompts && k.takes_prompts(dtype);
    if (!rounds && tokens > kMaxTokens && !takes_prompts) {
        return with_shape(linear_dense(flat, m, perm, bias, dtype), shape);
    }
    Tensor y = stable::new_empty(x, shape);
    const Call call{flat, m, order, bias_data, dtype, y};
    if (rounds) {
        linear_rounded(call, *k.rounded);
    } else {
        linear_packed(call, takes_prompts ? kPromptTokens : kMaxTokens);
    }
    return y;
}

Tensor dequantize_cpu(const char* op, const Tensor& like, const Matrix& m, const std::optional<Tensor>& perm,
                      ScalarType dtype) {
    const DType out_dtype = float_dtype(op, "dtype", dtype);
    const int32_t* order = permutation(op, perm, m.columns);
    Tensor out = stable::new_empty(like, {m.rows, m.columns}, dtype);
    dequantize_rows(m, order, out.mutable_data_ptr(), 0, ceil_div(m.rows, kRows), out_dtype);
    return out;
}

}  // namespace hf_spqr
