// Statistics of affine layouts whose groups hold whole sets of 128 columns: groups of 128, or one per row. Every lane
// fetches those of its own two rows; nothing goes through shared memory.
#pragma once
#include "cuda/integer.cuh"
#include "cuda/matrix.h"

namespace hf_spqr {

template <int H>
HF_DEVICE float half_of(uint32_t word) {
    return H ? dev::high_float(word) : dev::low_float(word);
}

// One half of a word of scales.
template <int H>
HF_DEVICE float scale_of(uint32_t word, bool bf16) {
    if (bf16) return dev::as_float(H ? word & 0xffff0000u : word << 16);
    return half_of<H>(word);
}

template <int BITS>
class StatsAffine128 {
  public:
    static constexpr bool kInteger = true;
    static constexpr int kTileShift = 7;
    static constexpr int kSharedWords = 0;
    static constexpr float kFactor = IntegerFields<BITS>::kFactor;
    static constexpr int kRowBlocks = BITS == 2 || BITS == 4 ? 2 : 1;  // of a warp: as many as the registers hold

    HF_DEVICE StatsAffine128(const Matrix& m, const uint32_t* stream, int lane, int, int, uint32_t)
        : m_(m), stream_(dev::keep(stream + 2 * (lane >> 2))) {}

    HF_DEVICE void prefetch(int) {}

    // A step is two groups: the halves of one word of scales, and one pair of zero codes. They are needed only after
    // the first set is multiplied, long enough to fetch them now.
    HF_DEVICE void decode(int step) {
        const int panel = step >> 4;
        pair_ = step & 15;
        const int offset = panel * m_.panels.panel_words;
        scales_ = dev::load_stream(reinterpret_cast<const uint2*>(stream_ + (offset + pair_ * kRows)));
        const int stat_words = panel == m_.panels.last_panel ? m_.panels.last_stat_words : m_.panels.stat_words;
        const int vector = BITS == 3 ? 0 : pair_ / (16 / BITS);
        const uint32_t* zeros = stream_ + (offset + stat_words + (vector - BITS) * kRows);
#pragma unroll
        for (int v = 0; v < kZeroVectors; ++v) {
            if (!m_.symmetric) zeros_[v] = dev::load_stream(reinterpret_cast<const uint2*>(zeros + v * kRows));
        }
    }

    // --- for resident.cuh: statistics of a step are in a slot, scales first ---

    static constexpr int kZeroVectors = BITS == 3 ? 3 : 1;
    static constexpr int kZeroShift = BITS == 2 ? 3 : BITS == 3 ? 4 : BITS == 4 ? 2 : 1;  // log2 of a vector's pairs
    static constexpr int kRingBytes = (1 + kZeroVectors) * kRows * 4;

    template <int TO>
    static HF_DEVICE void fetch(const Matrix& m, const uint32_t* stream, uint32_t panel, int stat_words, int pair,
                                uint32_t slot, int lane_words) {
        if (lane_words >= (m.symmetric ? kRows : kRingBytes / 4)) return;
        const int zeros = (kRows - 1 - lane_words) >> 31;  // all bits, of lanes that fetch zero codes
        const int vector = pair >> (zeros & kZeroShift), first = (stat_words - (BITS + 1) * kRows) & zeros;
        dev::copy_stream<TO, 0>(slot + 4 * lane_words,
                                stream + (panel + uint32_t(vector * kRows + first + lane_words)), true);
    }
    HF_DEVICE void begin(const uint32_t*) {}
    HF_DEVICE void take(uint32_t slot, int step) {
        pair_ = step & 15;
        slot += 8 * (dev::thread() >> 2 & 7);
        scales_ = dev::load_shared2<0>(slot);
        zeros_[0] = dev::load_shared2<4 * kRows>(slot);
        if constexpr (kZeroVectors > 1) {
            zeros_[1] = dev::load_shared2<8 * kRows>(slot);
            zeros_[2] = dev::load_shared2<12 * kRows>(slot);
        }
    }

    // Of set 0, then of set 1.
    template <int H>
    HF_DEVICE SetScales set() {
        if constexpr (H == 0) {
            zero_[0] = zero_pair(0);
            zero_[1] = zero_pair(1);
        }
        return {{scale_of<H>(scales_.x, m_.scale_bf16), scale_of<H>(scales_.y, m_.scale_bf16)},
                {half_of<H>(zero_[0]), half_of<H>(zero_[1])}};
    }

  private:
    // The zero points of both sets in one row, as fp16 subnormals in the place of a code.
    HF_DEVICE uint32_t zero_pair(int r) const {
        uint32_t zero = (1u << (BITS - 1)) * 0x00010001u;
        if (!m_.symmetric) {
            zero = plain_pair(BITS, pair_, [&](int v) {
                uint2 w = zeros_[0];
                if constexpr (BITS == 3) w = v == 0 ? zeros_[0] : v == 1 ? zeros_[1] : zeros_[2];
                return r ? w.y : w.x;
            });
        }
        return zero << IntegerFields<BITS>::kFirst;
    }

    const Matrix& m_;
    const uint32_t* stream_;
    int pair_;
    uint2 scales_, zeros_[kZeroVectors];
    uint32_t zero_[2];
};

template <int BITS>
class StatsAffineChannel {
  public:
    static constexpr bool kInteger = true;
    static constexpr int kTileShift = 30;
    static constexpr int kSharedWords = 0;
    static constexpr float kFactor = IntegerFields<BITS>::kFactor;

    static constexpr int kRowBlocks = BITS == 8 ? 1 : 2;

    HF_DEVICE StatsAffineChannel(const Matrix& m, const uint32_t* stream, int lane, int, int, uint32_t)
        : m_(m), words_(dev::load_stream(reinterpret_cast<const uint2*>(stream) + (lane >> 2))) {}

    HF_DEVICE void prefetch(int) {}
    HF_DEVICE void decode(int) {}

    // --- for resident.cuh: nothing in slots ---

    static constexpr int kRingBytes = 0;

    template <int TO>
    static HF_DEVICE void fetch(const Matrix&, const uint32_t*, uint32_t, int, int, uint32_t, int) {}
    HF_DEVICE void begin(const uint32_t* stream) {
        words_ = dev::load_stream(reinterpret_cast<const uint2*>(stream) + (dev::thread() >> 2 & 7));
    }
    HF_DEVICE void take(uint32_t, int) {}

    template <int H>
    HF_DEVICE SetScales set() const {
        return {{scale_of<0>(words_.x, m_.scale_bf16), scale_of<0>(words_.y, m_.scale_bf16)},
                {zero(words_.x), zero(words_.y)}};
    }

  private:
    HF_DEVICE float zero(uint32_t word) const {
        return dev::low_float((m_.symmetric ? 1u << (BITS - 1) : word >> 16) << IntegerFields<BITS>::kFirst);
    }

    const Matrix& m_;
    uint2 words_;
};

}  // namespace hf_spqr
