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

// Fetches for a pass over R row blocks, line by line and a little ahead of where it is: so little that the lines are
// still in the first-level cache when they are needed, so far that the memory has answered by then.
template <int R>
struct Ahead {
    static constexpr int64_t kBytes = 13 << 10;  // of all row blocks together: measured best from 11 to 17 KB
    const char* next;                            // in the first of the row blocks
    int64_t block_bytes, bytes_left;             // left: of this row block

    Ahead(const Matrix& m, int64_t first_block) : block_bytes(m.words * 4) {
        const int64_t wanted = kBytes / R / kLine * kLine, distance = wanted < block_bytes ? wanted : block_bytes;
        next = reinterpret_cast<const char*>(m.packed + first_block * m.words) + distance;
        bytes_left = block_bytes - distance;
        next_pass();
    }

    void lines(int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            fetch(0);
            advance(1);
            next_pass();
        }
    }

    template <int Count>
    __attribute__((always_inline)) void lines() {
        if (__builtin_expect(bytes_left < Count * kLine, 0)) return lines(Count);
#pragma GCC unroll 8
        for (int i = 0; i < Count; ++i) fetch(i);
        advance(Count);
        next_pass();
    }

  private:
    __attribute__((always_inline)) void fetch(int64_t line) const {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) _mm_prefetch(next + r * block_bytes + line * kLine, _MM_HINT_T0);
    }
    void advance(int64_t count) {
        next += count * kLine;
        bytes_left -= count * kLine;
    }
    // Where a row block ends, the same one of the next pass begins.
    void next_pass() {
        if (bytes_left > 0) return;
        next += (R - 1) * block_bytes;
        bytes_left = block_bytes;
    }
};

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
