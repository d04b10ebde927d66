// What the statistics of all layouts share.
#pragma once
#include "cuda/fragment.cuh"
#include "cuda/kernels.h"

namespace hf_spqr {

// The power of two that brings the largest scale of a step into [2^14, 2^15), from that scale's fp32 bits. Scales
// below 2^-113 remain smaller: up() would not be finite.
class StepScale {
  public:
    static constexpr int kMostBack = 13;

    HF_DEVICE explicit StepScale(uint32_t largest) {
        const uint32_t power = largest & 0x7f800000u;
        power_ = power < at(14) ? at(14) : power;
    }
    HF_DEVICE float up() const { return dev::as_float(at(268) - power_); }
    // 1 / up() * 2^more; finite for scales of any size where `more` is at most kMostBack.
    HF_DEVICE float back(int more) const { return dev::as_float(power_ + uint32_t(more - 14) * at(1)); }

  private:
    static HF_CONSTANT uint32_t at(uint32_t exponent) { return exponent << 23; }

    uint32_t power_;  // of two, as a float
};

// From the words (s, shift) of the rows 2g and 2g + 1.
template <int BITS>
HF_DEVICE void fill(Quarter& q, uint2 both) {
    constexpr uint32_t kFactors = one_and_power(Fields<BITS>::kLow - Fields<BITS>::kHigh);
    const uint32_t first = dev::hmul2(dev::low_twice(both.x), kFactors);
    const uint32_t second = dev::hmul2(dev::low_twice(both.y), kFactors);
    q.low[0] = dev::low_twice(first);
    q.low[1] = dev::low_twice(second);
    q.high[0] = dev::high_twice(first);
    q.high[1] = dev::high_twice(second);
    q.shift[0] = dev::high_twice(both.x);
    q.shift[1] = dev::high_twice(both.y);
}

}  // namespace hf_spqr
