// Statistics of stats_affine128.cuh for a kernel that takes weights as fp16: code - zero, which is exact, times the
// scale. Scales are brought into the range of fp16 step by step, as in stats_spqr16.cuh, but each row for itself.
#pragma once
#include "cuda/stats_affine128.cuh"
#include "cuda/step_scale.cuh"

namespace hf_spqr {

template <class Integer, int BITS>
class StatsAffineHalf {
  public:
    static constexpr bool kSubtract = true;
    static constexpr bool kRowScales = true;
    static constexpr float kFactor = 1.f;
    static constexpr int kTileShift = Integer::kTileShift;
    static constexpr int kSharedWords = 0;
    static HF_CONSTANT int shared_words(const Matrix&) { return 0; }

    HF_DEVICE StatsAffineHalf(const Matrix& m, const uint32_t* stream, int lane, int first_step, int stride,
                              uint32_t shared)
        : of_set_(m, stream, lane, first_step, stride, shared) {}

    HF_DEVICE void prefetch(int step) { of_set_.decode(step); }

    // Each factor() is at least as large as here.
    HF_DEVICE void decode(int, const float (&least)[2]) {
        const SetScales sets[2] = {of_set_.template set<0>(), of_set_.template set<1>()};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float before = dev::mul(least[r], float(1 << (14 - kPlace)));
            const float largest = fmaxf(before, fmaxf(fabsf(sets[0].scale[r]), fabsf(sets[1].scale[r])));
            const StepScale scale(dev::as_bits(largest));
            factor_[r] = scale.back(kPlace);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float z = dev::mul(sets[h].zero[r], -Integer::kFactor / float(1 << kPlace));
                words_[h][r] = dev::to_half2(dev::mul(sets[h].scale[r], scale.up()), z);
            }
        }
    }

    template <int H>
    HF_DEVICE void load_set() {}

    template <int H, int I>
    HF_DEVICE void quarter(Quarter& q) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            q.low[r] = dev::low_twice(words_[H][r]);
            q.shift[r] = dev::high_twice(words_[H][r]);
        }
    }

    // Of the lane's row 2g + r.
    HF_DEVICE float factor(int r) const { return factor_[r]; }

  private:
    static constexpr int kPlace = 12 - Fields<BITS>::kLow;  // weights are made of codes * 2^-kPlace
    static_assert(kPlace <= StepScale::kMostBack);

    Integer of_set_;
    uint32_t words_[2][2];  // of set and row: scale, -zero
    float factor_[2];
};

}  // namespace hf_spqr
