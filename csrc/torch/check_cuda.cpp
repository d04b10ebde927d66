#include "torch/check_cuda.h"
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include "cuda/kernels.h"

namespace hf_spqr {
namespace {

template <class Layout>
void check_size(const char* op, int64_t in_features, const Layout& layout) {
    check_layout(op, in_features, layout);
    STD_TORCH_CHECK(layout.out_features < kMostFeatures, op, ": out_features must be below 2^26, got ",
                    layout.out_features);
    STD_TORCH_CHECK(in_features < kMostFeatures, op, ": in_features must be below 2^26, got ", in_features);
}

void check_packed(const char* op, int device, const Tensor& packed, Matrix& m) {
    check_tensor(op, "packed", device, packed, ScalarType::Int, "int32");
    m.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
    m.panels = panels_of(m);
    const int64_t blocks = ceil_div(m.rows, 16);
    STD_TORCH_CHECK(packed.dim() == 2 && packed.size(0) == blocks && packed.size(1) == m.panels.words, op,
                    ": packed must have shape [", blocks, ", ", m.panels.words, "] for this layout of a ", m.rows,
                    " x ", m.columns, " matrix");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(m.packed) % 16 == 0, op, ": packed must be aligned to 16 bytes");
}

}  // namespace

void check_tensor(const char* op, const char* name, int device, const Tensor& t, ScalarType dtype,
                  const char* dtype_name) {
    STD_TORCH_CHECK(t.is_cuda(), op, ": ", name, " is not on a GPU but other arguments are on cuda:", device,
                    "; move the module to that device");
    STD_TORCH_CHECK(t.get_device_index() == device, op, ": ", name, " is on cuda:", int(t.get_device_index()),
                    " but other arguments are on cuda:", device, "; all must be on one device");
    STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have dtype ", dtype_name);
    STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

Matrix spqr_matrix(const char* op, int device, const Tensor& packed, const Tensor& outlier_row, const Tensor& outlier,
                   int64_t in_features, const SpqrLayout& layout) {
    check_size(op, in_features, layout);
    Matrix m = matrix_of(in_features, layout);
    check_packed(op, device, packed, m);

    check_tensor(op, "outlier_row", device, outlier_row, ScalarType::Int, "int32");
    STD_TORCH_CHECK(outlier_row.dim() == 1 && outlier_row.size(0) == layout.out_features + 1, op,
                    ": outlier_row must have shape [out_features + 1] = [", layout.out_features + 1, "]");
    const bool wide = in_features > 65536;
    check_tensor(op, "outlier", device, outlier, wide ? ScalarType::Long : ScalarType::Int, wide ? "int64" : "int32");
    STD_TORCH_CHECK(outlier.dim() == 1, op, ": outlier must have one dimension, got ", outlier.dim());
    set_outliers(m, outlier_row, outlier);
    return m;
}

Matrix affine_matrix(const char* op, int device, const Tensor& packed, int64_t in_features,
                     const AffineLayout& layout) {
    check_size(op, in_features, layout);
    Matrix m = matrix_of(in_features, layout);
    check_packed(op, device, packed, m);
    return m;
}

const int32_t* permutation(const char* op, int device, const OptionalTensor& perm, int64_t in_features) {
    if (!perm) return nullptr;
    check_tensor(op, "perm", device, *perm, ScalarType::Int, "int32");
    STD_TORCH_CHECK(perm->dim() == 1 && perm->size(0) == in_features, op, ": perm must have shape [in_features] = [",
                    in_features, "]");
    return static_cast<const int32_t*>(perm->const_data_ptr());
}

const void* bias_of(const char* op, int device, const OptionalTensor& bias, int64_t out_features, ScalarType dtype,
                    const char* dtype_name) {
    if (!bias) return nullptr;
    check_tensor(op, "bias", device, *bias, dtype, dtype_name);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias must have shape [out_features] = [",
                    out_features, "]");
    return bias->const_data_ptr();
}

int64_t token_count(const char* op, int64_t numel, int64_t columns) {
    constexpr int64_t kMostTokens = int64_t(1) << 28;
    const int64_t tokens = numel / columns;
    STD_TORCH_CHECK(tokens < kMostTokens, op, ": too many tokens in one call: ", tokens);
    return tokens;
}

void* current_stream(int device) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return stream;
}

void check_launch(const char* op, const char* kernel, int status) {
    STD_TORCH_CHECK(status == 0, op, ": launch of the ", kernel, " kernel failed: ", hf_spqr_cuda_error(status));
}

int device_of(const char* op, const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), op, ": ", name, " must be on a GPU, as other arguments are");
    return int(t.get_device_index());
}

}  // namespace hf_spqr
