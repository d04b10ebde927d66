#include "torch/linear_cuda.h"
#include <algorithm>
#include <vector>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace hf_spqr {
namespace {

namespace stable = torch::stable;

// One call of a linear op.
struct Call {
    const char* op;
    int device;
    void* stream;
    Matrix matrix;
    const int32_t* perm;
    const void* bias;
    DType dtype;
    int tokens;
};

// x in the stored order of columns, as fp16.
struct PreparedX {
    Tensor x;  // [tokens, columns], rows maybe padded
    int64_t stride;
    std::optional<Tensor> token_scale;  // fp32 [tokens]

    const float* scale() const {
        return token_scale ? static_cast<const float*>(token_scale->const_data_ptr()) : nullptr;
    }
};

PreparedX prepare(const Call& c, const Tensor& x) {
    const int64_t columns = c.matrix.columns, stride = prepared_stride(columns);
    PreparedX p{stable::new_empty(x, {c.tokens, stride}, ScalarType::Half), stride, std::nullopt};
    float* scale = nullptr;
    if (c.dtype != DType::f16) {
        p.token_scale = stable::new_empty(x, {c.tokens}, ScalarType::Float);
        scale = static_cast<float*>(p.token_scale->mutable_data_ptr());
    }
    const PrepareArgs args{x.const_data_ptr(),
                           c.dtype,
                           c.perm,
                           c.tokens,
                           int(columns),
                           static_cast<uint16_t*>(p.x.mutable_data_ptr()),
                           stride,
                           scale};
    check_launch(c.op, "prepare", hf_spqr_cuda_prepare(&args, c.stream));
    return p;
}

bool aligned(const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// x as the fused kernels take it.
PreparedX half_of(const Call& c, const Tensor& x) {
    const bool as_it_is = !needs_prepare(c.dtype, c.perm != nullptr, c.matrix.columns) && aligned(x);
    return as_it_is ? PreparedX{x, c.matrix.columns, std::nullopt} : prepare(c, x);
}

void linear_few(const Call& c, const Tensor& x, Tensor& y) {
    const ResidentArgs resident{c.matrix, x.const_data_ptr(), c.perm, c.bias, y.mutable_data_ptr(),
                                c.dtype,  c.tokens,           {}};
    const int status = hf_spqr_cuda_linear_resident(&resident, c.stream);
    if (status != kNoKernel) return check_launch(c.op, "resident linear", status);
    const PreparedX p = half_of(c, x);
    const auto* half = static_cast<const uint16_t*>(p.x.const_data_ptr());
    LinearArgs args{c.matrix, half, p.stride, p.scale(), c.tokens, c.bias, y.mutable_data_ptr(), c.dtype, nullptr};
    std::optional<Tensor> columns;
    if (c.matrix.outlier) {
        columns = stable::new_empty(x, {c.matrix.columns, kLinearTokens}, ScalarType::Half);
        const TransposeArgs transpose{half, p.stride, c.tokens, c.matrix.columns,
                                      static_cast<uint16_t*>(columns->mutable_data_ptr())};
        check_launch(c.op, "transpose", hf_spqr_cuda_transpose(&transpose, c.stream));
        args.x_columns = transpose.out;
    }
    check_launch(c.op, "linear", hf_spqr_cuda_linear(&args, c.stream));
}

// The sums of parts of the columns, then these added up. False where there is no kernel for it.
bool linear_tiled(const Call& c, const Tensor& x, Tensor& y) {
    const Matrix& m = c.matrix;
    if (c.tokens > most_tiled_tokens(c.dtype)) return false;
    int parts = 0;
    check_launch(c.op, "device query", hf_spqr_cuda_tiled_parts(&m, c.tokens, &parts));
    if (parts == 0) return false;
    const PreparedX p = half_of(c, x);
    const int64_t stride = ceil_div(m.rows, 16) * 16;
    Tensor sums = stable::new_empty(x, {parts, c.tokens, stride}, ScalarType::Float);
    const auto* half = static_cast<const uint16_t*>(p.x.const_data_ptr());
    const TiledArgs args{m, half, p.stride, p.scale(), c.tokens, parts, static_cast<float*>(sums.mutable_data_ptr())};
    const int status = hf_spqr_cuda_linear_tiled(&args, c.stream);
    if (status == kNoKernel) return false;
    check_launch(c.op, "tiled linear", status);
    const FinishArgs finish{args.sums, DType::f32,           parts,  stride, m.rows, 0, m.rows, c.tokens, nullptr,
                            c.bias,    y.mutable_data_ptr(), c.dtype};
    check_launch(c.op, "finish", hf_spqr_cuda_finish(&finish, c.stream));
    return true;
}

// Through dense weights: fp32 for fp32, else fp16 (weights are never rounded to bfloat16).
void linear_many(const Call& c, const Tensor& x, Tensor& y) {
    const Matrix& m = c.matrix;
    const bool full = c.dtype == DType::f32;
    const bool as_it_is = full || (c.dtype == DType::f16 && !c.perm);
    PreparedX p = as_it_is ? PreparedX{x, m.columns, std::nullopt} : prepare(c, x);
    const Tensor left = p.stride == m.columns ? p.x : stable::narrow(p.x, 1, 0, m.columns);
    const ScalarType kind = full ? ScalarType::Float : ScalarType::Half;
    int multiprocessors = 0;
    check_launch(c.op, "device query", hf_spqr_cuda_multiprocessors(&multiprocessors));
    const int64_t part_rows = stretch_rows(m.rows, int64_t(m.columns) * (full ? 4 : 2), c.tokens, multiprocessors);
    for (int64_t first = 0; first < m.rows; first += part_rows) {
        const int64_t rows = std::min<int64_t>(part_rows, m.rows - first);
        Tensor weight = stable::new_empty(x, {rows, m.columns}, kind);
        const DequantizeArgs dequantize{
            m,         full ? c.perm : nullptr,        int(first), int(rows), weight.mutable_data_ptr(),
            m.columns, full ? DType::f32 : DType::f16, 0};
        check_launch(c.op, "dequantize", hf_spqr_cuda_dequantize(&dequantize, c.stream));
        const Tensor product = stable::matmul(left, stable::transpose(weight, 0, 1));
        STD_TORCH_CHECK(product.is_contiguous(), c.op, ": torch returned a product that is not contiguous");
        const FinishArgs finish{product.const_data_ptr(),
                                full ? DType::f32 : DType::f16,
                                1,
                                rows,
                                int(rows),
                                int(first),
                                m.rows,
                                c.tokens,
                                p.scale(),
                                c.bias,
                                y.mutable_data_ptr(),
                                c.dtype};
        check_launch(c.op, "finish", hf_spqr_cuda_finish(&finish, c.stream));
    }
}

}  // namespace

Tensor linear_cuda(const char* op, const Tensor& x, const Matrix& m, const OptionalTensor& perm,
                   const OptionalTensor& bias) {
    const int device = int(x.get_device_index());
    const stable::accelerator::DeviceGuard guard(device);
    Call c{op,
           device,
           current_stream(device),
           m,
           permutation(op, device, perm, m.columns),
           bias_of(op, device, bias, m.rows, x.scalar_type(), "that of x"),
           float_dtype(op, "x", x.scalar_type()),
           0};
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    const int64_t tokens = token_count(op, x.numel(), m.columns);
    shape.back() = m.rows;
    Tensor y = stable::new_empty(x, shape);  // no view, which autograd forbids to change in place
    c.tokens = int(tokens);
    if (tokens > 0) {
        const Tensor flat = stable::reshape(stable::contiguous(x), {tokens, m.columns});
        Tensor rows = stable::view(y, {tokens, m.rows});
        if (hf_spqr_cuda_can_fuse(&m, c.tokens)) {
            linear_few(c, flat, rows);
        } else if (!linear_tiled(c, flat, rows)) {
            linear_many(c, flat, rows);
        }
    }
    return y;
}

Tensor dequantize_cuda(const char* op, const Tensor& like, const Matrix& m, const OptionalTensor& perm,
                       ScalarType dtype) {
    const int device = int(like.get_device_index());
    const stable::accelerator::DeviceGuard guard(device);
    const DType kind = float_dtype(op, "dtype", dtype);
    Tensor out = stable::new_empty(like, {m.rows, m.columns}, dtype);
    const DequantizeArgs args{
        m, permutation(op, device, perm, m.columns), 0, m.rows, out.mutable_data_ptr(), m.columns, kind, 0};
    check_launch(op, "dequantize", hf_spqr_cuda_dequantize(&args, current_stream(device)));
    return out;
}

}  // namespace hf_spqr
