// Statistics of SpQR's usual layout: groups of 16 columns, 3-bit scale and zero codes. A step of 256 columns is a panel.
//
// 16 groups x 16 rows of (scale, zero) per step, 8 for each lane: lane 16 h + r decodes row r of the groups 2i + h, whose
// places in the tile are the same for both h up to a shift by h fields, and leaves (s, -s z) as half2 in shared memory.
//
// s is scaled by a power of two per step so that the step's largest fits fp16 with the factor of a field; the sums are
// scaled back in fp32 (factor()).
#pragma once
#include "cuda/fragment.cuh"
#include "cuda/step_scale.cuh"

namespace hf_spqr {

template <int BITS>
class StatsSpqr16 {
  public:
    static constexpr bool kInteger = false;
    static constexpr int kTileShift = 3;  // log2 of the tiles of a panel
    static constexpr int kSharedWords = 2 * 208 + 32;

    HF_DEVICE StatsSpqr16(const Matrix& m, const uint32_t* stream, int lane, uint32_t* shared)
        : m_(m), stream_(stream), lane_(lane), shared_(shared) {}

    HF_DEVICE void prefetch(int step) {
        const uint32_t* panel = stream_ + step * m_.panels.panel_words;
        const bool alive = step <= m_.panels.last_panel;
#pragma unroll
        for (int v = 0; v < 3; ++v) codes_[v] = alive ? dev::load_stream(panel + v * kRows + (lane_ & 15)) : 0u;
        const bool has_group = lane_ < 16 && step * 16 + lane_ < m_.panels.groups;
        const int entry = m_.groups_per_second == 2 ? lane_ >> 1 : lane_;
        second_ = make_uint2(0, 0);
        if (has_group) second_ = dev::load_stream(reinterpret_cast<const uint2*>(panel + 3 * kRows) + entry);
    }

    HF_DEVICE void decode(int) {
        uint2* constants = reinterpret_cast<uint2*>(shared_ + 2 * 208);
        const float ss = dev::low_float(second_.x), sz = dev::high_float(second_.x);
        const float zs = dev::low_float(second_.y), zz = dev::high_float(second_.y);
        const float largest = dev::mul(fabsf(ss), fmaxf(fabsf(sz), fabsf(7.f - sz)));
        const StepScale scale(dev::max_of_warp(dev::as_bits(largest)));
        factor_ = scale.back(24 - Fields<BITS>::kLow);
        if (lane_ < 16) {
            // (s, z) = code * first + second, z as -z * 2^kZero so that s * 2^-16 times it is the shift
            const float up = dev::mul(ss, scale.up()), down = dev::mul(zs, dev::as_float(uint32_t(127 + kZero) << 23));
            constants[lane_] = make_uint2(dev::to_half2(up, -down), dev::to_half2(-dev::mul(up, sz), dev::mul(down, zz)));
        }
        dev::sync_warp();
        const int h = lane_ >> 4, row = lane_ & 15;
        const uint32_t w0 = codes_[0] >> 3 * h, w1 = codes_[1] >> 3 * h, w2 = codes_[2] >> 3 * h;
        const uint32_t spare = (codes_[0] >> 15 & 0x00010001u) | (codes_[1] >> 14 & 0x00020002u) |
                               (codes_[2] >> 13 & 0x00040004u);
        const uint32_t raw[8] = {w0, w0 >> 6, w1, (h ? codes_[1] : codes_[0]) >> 12, w1 >> 6, w2, w2 >> 6,
                                 h ? spare : codes_[2] >> 12};
        uint32_t* out = shared_ + h * 208 + row;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint2 c = constants[2 * i + h];
            const uint32_t q = dev::hadd2((raw[i] & 0x00070007u) | 0x64006400u, 0xe400e400u);  // 1024 + q, - 1024
            const uint32_t sz2 = dev::hfma2(q, c.x, c.y);
            const uint32_t s = dev::hmul2(dev::low_twice(sz2), one_and_power(-16));
            out[i * 24] = dev::hmul2(s, (sz2 & 0xffff0000u) | 0x3c00u);
        }
    }

    // Of the lane's rows 2g, 2g + 1 in its tile 4 H + t.
    template <int H, int I>
    HF_DEVICE void quarter(Quarter& q) const {
        if constexpr (I % 2 == 0) {
            const int t = lane_ & 3, g = lane_ >> 2;
            const uint2 both = dev::load_shared(
                reinterpret_cast<const uint2*>(shared_ + I / 2 * 208 + (4 * H + t) * 24 + 2 * g));
            fill<BITS>(q, both);
        }
    }

    HF_DEVICE float factor(int, int) const { return factor_; }

  private:
    static constexpr int kZero = Fields<BITS>::kLow - 8;

    const Matrix& m_;
    const uint32_t* stream_;
    int lane_;
    uint32_t* shared_;
    uint32_t codes_[3];
    uint2 second_;
    float factor_;
};

}  // namespace hf_spqr
