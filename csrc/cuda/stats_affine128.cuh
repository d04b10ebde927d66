// Statistics of affine layouts whose groups hold whole sets of 128 columns: groups of 128, or one per row.
//
// A set then has one scale and zero point per row, so the tensor cores multiply exact integers (q - z) * 2^-12 and the
// scale comes in fp32 after each set: weights are not rounded at all. Every lane fetches the statistics of its own two
// rows; nothing goes through shared memory.
#pragma once
#include "cuda/matrix.h"
#include "cuda/step_scale.cuh"

namespace hf_spqr {

template <int BITS, bool PER_CHANNEL>
class StatsAffine128 {
  public:
    static constexpr bool kInteger = true;
    static constexpr int kTileShift = PER_CHANNEL ? 30 : 7;
    static constexpr int kSharedWords = 0;

    HF_DEVICE StatsAffine128(const Matrix& m, const uint32_t* stream, int lane, int, int, uint32_t)
        : m_(m), stream_(stream + 2 * (lane >> 2)) {}

    // A step is two groups: the halves of one word of scales, and one pair of zero codes.
    HF_DEVICE void prefetch(int step, bool exists) {
        if constexpr (PER_CHANNEL) {
            scales_ = dev::load_stream(reinterpret_cast<const uint2*>(stream_));
        } else {
            if (!exists) return;
            const int panel = step >> 4, pair = step & 15;
            const uint32_t* start = stream_ + panel * m_.panels.panel_words;
            scales_ = dev::load_stream(reinterpret_cast<const uint2*>(start + pair * kRows));
            if (m_.symmetric) return;
            const int here = panel == m_.panels.last_panel ? m_.panels.groups - 32 * panel : 32;
            const uint32_t* zeros = start + (here + 1) / 2 * kRows;
            if constexpr (BITS == 3) {
#pragma unroll
                for (int v = 0; v < 3; ++v) zeros_[v] = dev::load_stream(reinterpret_cast<const uint2*>(zeros + v * kRows));
            } else {
                zeros_[0] = dev::load_stream(reinterpret_cast<const uint2*>(zeros + pair / (16 / BITS) * kRows));
            }
        }
    }

    HF_DEVICE void decode(int step) {
        row(scales_.x, 0, step & 15);
        row(scales_.y, 1, step & 15);
    }

    template <int H, int>
    HF_DEVICE void quarter(Quarter& q) {
        q.shift[0] = H ? dev::high_twice(shift_[0]) : dev::low_twice(shift_[0]);
        q.shift[1] = H ? dev::high_twice(shift_[1]) : dev::low_twice(shift_[1]);
    }

    // s * 2^12 of row 2g + r in set h.
    HF_DEVICE float factor(int h, int r) const { return factor_[h][r]; }

  private:
    HF_DEVICE void row(uint32_t scales, int r, int pair) {
        uint32_t zero;
        if constexpr (PER_CHANNEL) {
            zero = (scales >> 16) * 0x00010001u;
            scales = (scales & 0xffffu) * 0x00010001u;
        } else {
            zero = plain_pair(BITS, pair, [&](int v) {
                const uint2 w = BITS == 3 ? (v == 0 ? zeros_[0] : v == 1 ? zeros_[BITS == 3] : zeros_[kZeroVectors - 1]) : zeros_[0];
                return r ? w.y : w.x;
            });
        }
        if (m_.symmetric) zero = (1u << (BITS - 1)) * 0x00010001u;
        // (1024 + z) * -2^-12 + 2^-2
        shift_[r] = dev::hfma2(zero | 0x64006400u, half2_power(-12) | 0x80008000u, half2_power(-2));
        const float low = m_.scale_bf16 ? dev::as_float(scales << 16) : dev::low_float(scales);
        const float high = m_.scale_bf16 ? dev::as_float(scales & 0xffff0000u) : dev::high_float(scales);
        factor_[0][r] = dev::mul(low, 4096.f);
        factor_[1][r] = dev::mul(high, 4096.f);
    }

    static constexpr int kZeroVectors = BITS == 3 ? 3 : 1;

    const Matrix& m_;
    const uint32_t* stream_;
    uint2 scales_{}, zeros_[kZeroVectors]{};
    uint32_t shift_[2];
    float factor_[2][2];
};

}  // namespace hf_spqr
