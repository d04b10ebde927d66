// The packed matrix of a case (emu/cases.h), as the CPU kernels take it.
#pragma once
#include <memory>
#include "cpu/matrix.h"
#include "emu/cases.h"

namespace hf_spqr {
namespace {

struct Weight {
    std::unique_ptr<Bytes> packed, outlier_row, outlier;
    Matrix m{};

    Weight(const Header& h, FILE* in)
        : packed(read_tensor(in)), outlier_row(read_tensor(in)), outlier(read_tensor(in)) {
        m.format = Format(h.format);
        m.bits = int(h.bits);
        m.group = int(h.group);
        m.rows = h.rows;
        m.columns = h.columns;
        m.packed = packed->as<uint32_t>();
        m.words = packed->size / 4 / ceil_div(m.rows, kRows);
        m.stat_bits = int(h.stat_bits);
        m.groups_per_second = int(h.groups_per_second);
        if (outlier->size > 0) {
            m.outlier_row = outlier_row->as<int32_t>();
            m.outlier = h.wide ? nullptr : outlier->as<uint32_t>();
            m.outlier_wide = h.wide ? outlier->as<uint64_t>() : nullptr;
        }
        m.symmetric = h.symmetric;
        m.scale_bf16 = h.scale_bf16;
    }
};

}  // namespace
}  // namespace hf_spqr
