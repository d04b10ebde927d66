// Outliers of one row, step by step, for a kernel that has its weights in shared memory (tiled.cuh): each lane has a
// row and adds its outliers to it. The entries of a row lie in the order of their columns.
#pragma once
#include "cuda/matrix.h"
#include "cuda/operands.cuh"

namespace hf_spqr {

class StepOutliers {
  public:
    // Of row `row` from column `first` on. `key` as in operands.cuh.
    HF_DEVICE StepOutliers(const Matrix& m, int64_t row, int first, int key) : entries_(m.outlier), key_(key) {
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

    // Those of the next step, on their way.
    HF_DEVICE void fetch() {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) held_[k] = next_ + k < end_ ? entries_[next_ + k] : kNone;
        after_ = next_ + kTogether < end_ ? entries_[next_ + kTogether] : kNone;
    }

    // Begins the step whose columns end at `end`. Returns the largest magnitude of its outliers, as if infinite ones
    // were the largest of fp16: they shall spoil no other row.
    HF_DEVICE float begin(int end) {
        rest_ = column_of(after_) < end ? next_ + kTogether : end_;
        float largest = 0.f;
        const auto take = [&](uint32_t entry) {
            const bool belongs = column_of(entry) < end;
            next_ += belongs;
            largest = fmaxf(largest, belongs ? fabsf(dev::high_float(entry)) : 0.f);
        };
#pragma unroll
        for (int k = 0; k < kTogether; ++k) take(held_[k]);
        rest(end, take);
        return fminf(largest, 65504.f);
    }

    // Weights are given divided by a power of two, 1 / up; outliers then fit fp16, too.
    HF_DEVICE void scale(int end, float up) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) held_[k] = placed(held_[k], end, up);
    }

    // Adds those of half HALF of set SET to the row's weights there, 64 columns as tiled.cuh has them at `to`.
    template <int SET, int HALF>
    HF_DEVICE void add(int end, float up, uint32_t to) const {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) add<SET, HALF>(to, held_[k]);
        rest(end, [&](uint32_t entry) { add<SET, HALF>(to, placed(entry, end, up)); });
    }

  private:
    static constexpr int kTogether = 6;         // entries that are held
    static constexpr uint32_t kNone = 0xffffu;  // an entry that adds nothing to whatever column

    static HF_DEVICE int column_of(uint32_t entry) { return int(entry & 0xffffu); }

    // What the step has beyond the entries that are held: few rows have, so one by one, and the one after it.
    template <class F>
    HF_DEVICE void rest(int end, const F& f) const {
        uint32_t entry = 0;
#pragma unroll 1
        for (int i = rest_; i < end_ && column_of(entry) < end; ++i) {
            entry = entries_[i];
            f(entry);
        }
    }

    // An outlier as it is added: which byte of the row in the lowest byte, set and half in the next, as bits 7 and 4
    // of the column, or no such number if it is not the step's; then the value.
    static HF_CONSTANT uint32_t half_of(int column) { return uint32_t(column & 0x90) << 8; }
    HF_DEVICE uint32_t placed(uint32_t entry, int end, float up) const {
        const int column = column_of(entry);
        const uint32_t at = chunk_place((column >> 4 & 6) | (column >> 3 & 1), key_) + 2 * (column & 7);
        const uint32_t half = column < end ? half_of(column) : 0xff00u;
        return dev::low_halves(at | half, dev::to_half2(dev::mul(dev::high_float(entry), up), 0.f));
    }

    template <int SET, int HALF>
    static HF_DEVICE void add(uint32_t to, uint32_t placed) {
        if ((placed & 0xff00u) != half_of(SET * 128 + HALF * 16)) return;
        to += placed & 0x7fu;
        dev::store_shared_half(to, dev::hadd2(dev::load_shared_half<0>(to), dev::high_twice(placed)));
    }

    const uint32_t* entries_;
    int key_, next_ = 0, end_ = 0;
    int rest_ = 0;  // where those of the step lie that are not held, or the row's end
    uint32_t held_[kTogether] = {};
    uint32_t after_ = kNone;  // the entry after those, which tells whether the step has more
};

}  // namespace hf_spqr
