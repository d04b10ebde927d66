// How work is cut into parts for torch's threads. Internal linkage.
#pragma once
#include <algorithm>
#include <torch/csrc/stable/ops.h>
#include "cpu/panels.h"

namespace hf_spqr {
namespace {

constexpr int64_t kBytesPerTask = 64 << 10;     // less is not worth a thread
constexpr int64_t kElementsPerTask = 32 << 10;  // of activations

// Bytes of the row blocks before `block`. Outlier-heavy rows count for what they are.
int64_t bytes_before(const Matrix& m, int64_t block) {
    int64_t bytes = block * m.words * 4;
    if (m.outlier_row) bytes += int64_t(m.outlier_row[std::min(block * kRows, m.rows)]) * (m.outlier ? 4 : 8);
    return bytes;
}

// The first row block of part `part` of `parts` parts with equal bytes.
int64_t part_begin(const Matrix& m, int64_t part, int64_t parts) {
    const int64_t blocks = ceil_div(m.rows, kRows);
    if (part >= parts) return blocks;
    const int64_t wanted = bytes_before(m, blocks) / parts * part;
    int64_t low = 0, high = blocks;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (bytes_before(m, middle) < wanted) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Runs work(first, last) on row blocks [begin, end) cut into one part per thread.
template <class Work>
void over_row_blocks(const Matrix& m, const Work& work) {
    const int64_t blocks = ceil_div(m.rows, kRows);
    const int64_t wanted = std::max<int64_t>(1, bytes_before(m, blocks) / kBytesPerTask);
    const int64_t parts = std::min({wanted, int64_t(torch::stable::get_num_threads()), blocks});
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        const int64_t first = part_begin(m, begin, parts), last = part_begin(m, end, parts);
        if (first < last) work(first, last);
    });
}

}  // namespace
}  // namespace hf_spqr
