#include "torch/check.h"
#include <torch/csrc/stable/ops.h>
#include "cpu/panels.h"

namespace hf_spqr {
namespace {

void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype, const char* dtype_name) {
    STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
    STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have dtype ", dtype_name);
    STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

// Words of a row block, from walking over its panels.
int64_t words_of(const Matrix& m) {
    PanelWalk walk(m, 0);
    while (walk.next()) {
    }
    return walk.panel.tiles + walk.panel.count * m.bits * kRows - m.packed;
}

void check_packed(const char* op, const Tensor& packed, Matrix& m) {
    check_tensor(op, "packed", packed, ScalarType::Int, "int32");
    m.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
    m.words = words_of(m);
    const int64_t blocks = ceil_div(m.rows, kRows);
    STD_TORCH_CHECK(packed.dim() == 2 && packed.size(0) == blocks && packed.size(1) == m.words, op,
                    ": packed must have shape [", blocks, ", ", m.words, "] for this layout of a ", m.rows, " x ",
                    m.columns, " matrix");
}

bool rises(const int32_t* numbers, int64_t count) {
    int falls = 0;  // counted, not looked for: a loop without an end of its own is vectorized
    for (int64_t i = 1; i < count; ++i) falls += numbers[i] < numbers[i - 1];
    return falls == 0;
}

}  // namespace

Matrix spqr_matrix(const char* op, const Tensor& packed, const Tensor& outlier_row, const Tensor& outlier,
                   int64_t in_features, const SpqrLayout& layout) {
    check_layout(op, in_features, layout);
    Matrix m = matrix_of(in_features, layout);
    check_packed(op, packed, m);

    check_tensor(op, "outlier_row", outlier_row, ScalarType::Int, "int32");
    STD_TORCH_CHECK(outlier_row.dim() == 1 && outlier_row.size(0) == m.rows + 1, op,
                    ": outlier_row must have shape [out_features + 1] = [", m.rows + 1, "]");
    const bool wide = in_features > 65536;
    check_tensor(op, "outlier", outlier, wide ? ScalarType::Long : ScalarType::Int, wide ? "int64" : "int32");
    STD_TORCH_CHECK(outlier.dim() == 1, op, ": outlier must have one dimension, got ", outlier.dim());
    const int32_t* row = static_cast<const int32_t*>(outlier_row.const_data_ptr());
    STD_TORCH_CHECK(row[0] == 0 && row[m.rows] == outlier.size(0) && rises(row, m.rows + 1), op,
                    ": outlier_row must rise from 0 to the number of outliers, ", outlier.size(0), "; it goes from ",
                    row[0], " to ", row[m.rows]);
    set_outliers(m, outlier_row, outlier);
    return m;
}

Matrix affine_matrix(const char* op, const Tensor& packed, int64_t in_features, const AffineLayout& layout) {
    check_layout(op, in_features, layout);
    Matrix m = matrix_of(in_features, layout);
    check_packed(op, packed, m);
    return m;
}

const int32_t* permutation(const char* op, const std::optional<Tensor>& perm, int64_t in_features) {
    if (!perm) return nullptr;
    check_tensor(op, "perm", *perm, ScalarType::Int, "int32");
    STD_TORCH_CHECK(perm->dim() == 1 && perm->size(0) == in_features, op, ": perm must have shape [in_features] = [",
                    in_features, "]");
    return static_cast<const int32_t*>(perm->const_data_ptr());
}

const void* bias_pointer(const char* op, const std::optional<Tensor>& bias, int64_t rows, ScalarType dtype,
                         const char* named) {
    if (!bias) return nullptr;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == rows, op, ": bias must have shape [out_features] = [", rows,
                    "]");
    STD_TORCH_CHECK(bias->scalar_type() == dtype, op, ": bias must have ", named);
    STD_TORCH_CHECK(bias->is_cpu() && bias->is_contiguous(), op, ": bias must be contiguous and on the CPU");
    return bias->const_data_ptr();
}

}  // namespace hf_spqr
