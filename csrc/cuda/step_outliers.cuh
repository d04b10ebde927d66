// Outliers of one row, step by step, for a kernel that has its weights in shared memory (tiled.cuh): each lane has a
// row and adds its outliers to it. The entries of a row lie in the order of their columns.
#pragma once
#include "cuda/matrix.h"
#include "cuda/operands.cuh"

namespace hf_spqr {

HF_DEVICE int column_of(uint32_t entry) {
    return int(entry & 0xffffu);
}

class StepOutliers {
  public:
    // Of row `row` from column `first` on.
    HF_DEVICE StepOutliers(const Matrix& m, int64_t row, int first) : entries_(m.outlier) {
        if (!entries_ || row >= m.rows) return;
        next_ = m.outlier_row[row];
        end_ = m.outlier_row[row + 1];
        for (int left = first > 0 ? end_ - next_ : 0; left > 0;) {
            const int half = left / 2;
            if (column_of(entries_[next_ + half]) < first) {
                next_ += half + 1;
                left -= half + 1;
            } else {
                left = half;
            }
        }
    }

    HF_DEVICE bool any() const { return entries_ != nullptr; }

    // Entries of the next step, on their way.
    HF_DEVICE void fetch() { load(ahead_, next_); }

    // Counts the entries before column `end`; their largest magnitude.
    HF_DEVICE float count(int end) {
        float largest = 0.f;
        count_ = 0;
        each(end, [&](uint32_t entry) {
            if (column_of(entry) >= end) return;
            ++count_;
            largest = fmaxf(largest, fabsf(dev::high_float(entry)));
        });
        return largest;
    }

    // Adds those of half `half` of set `set` to the row's weights there, 64 columns as tiled.cuh has them at `to`, of
    // which `up` times is what the weights stand for. `first`: the step's first column.
    template <int SET, int HALF>
    HF_DEVICE void add(int first, uint32_t to, int key, float up) const {
        const int wanted = first + SET * kTilesPerSet * kColumns + HALF * (kColumns / 2);
        each(first + kStepColumns, [&](uint32_t entry) {
            const int column = column_of(entry);
            if ((column & ~0x6f) != wanted) return;  // all but the tile in its set and the column in its half
            const uint32_t at = to + chunk_place((column >> 4 & 6) | (column >> 3 & 1), key) + 2 * (column & 7);
            const float weight = dev::low_float(dev::load_shared_half<0>(at));
            dev::store_shared_half(at, dev::to_half2(dev::fma(dev::high_float(entry), up, weight), 0.f));
        });
    }

    // Behind the step's entries.
    HF_DEVICE void advance() { next_ += count_; }

  private:
    static constexpr int kTogether = 8;  // entries at a time

    HF_DEVICE void load(uint32_t (&e)[kTogether], int first) const {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) e[k] = first + k < end_ ? entries_[first + k] : kNone;
    }

    // All entries before column `end`, and some after them.
    template <class F>
    HF_DEVICE void each(int end, const F& f) const {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) f(ahead_[k]);
        uint32_t last = ahead_[kTogether - 1];
        for (int first = next_ + kTogether; first < end_ && column_of(last) < end; first += kTogether) {
            uint32_t e[kTogether];
            load(e, first);
#pragma unroll
            for (int k = 0; k < kTogether; ++k) f(e[k]);
            last = e[kTogether - 1];
        }
    }

    static constexpr uint32_t kNone = 0xffffu;  // adds nothing to whatever column

    const uint32_t* entries_;
    int next_ = 0, end_ = 0, count_ = 0;
    uint32_t ahead_[kTogether] = {};
};

}  // namespace hf_spqr
