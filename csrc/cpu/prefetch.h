// Fetches ahead what a pass over row blocks is going to need. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include "cpu/panels.h"

namespace hf_spqr {
namespace {

constexpr int kLine = 64;

// How far ahead a pass over `blocks` row blocks fetches: the same place of the next pass, so that nothing is fetched
// in vain where a row block ends, and the memory has a whole pass's time to answer.
inline int64_t pass_bytes(const Matrix& m, int blocks) {
    return blocks * m.words * 4;
}

inline void prefetch_lines(const void* p, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) _mm_prefetch(static_cast<const char*>(p) + i * kLine, _MM_HINT_T0);
}

// The outliers of a pass over `blocks` row blocks, which come after its dense weights: a share with each panel.
struct OutlierPrefetch {
    const char* next = nullptr;
    int64_t lines_left = 0, lines_per_panel = 0;

    OutlierPrefetch(const Matrix& m, int64_t block, int blocks) {
        if (m.outlier_row == nullptr || block * kRows >= m.rows) return;
        const int64_t rows = (block + blocks) * kRows < m.rows ? (block + blocks) * kRows : m.rows;
        const int64_t first = m.outlier_row[block * kRows], last = m.outlier_row[rows], size = m.outlier ? 4 : 8;
        next = m.outlier ? reinterpret_cast<const char*>(m.outlier + first)
                         : reinterpret_cast<const char*>(m.outlier_wide + first);
        lines_left = ceil_div((last - first) * size, kLine);
        const int64_t panel_columns = m.group == kPerChannel ? m.columns : 16 * m.group;
        lines_per_panel = ceil_div(lines_left, ceil_div(m.columns, panel_columns));
    }

    void panel() {
        for (int64_t i = 0; i < lines_per_panel && lines_left > 0; ++i, --lines_left, next += kLine) {
            _mm_prefetch(next, _MM_HINT_T1);
        }
    }
};

}  // namespace
}  // namespace hf_spqr
