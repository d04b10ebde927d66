// Statistics of affine layouts with groups of 32 or 64 columns, so that a tile lies within one: every lane decodes
// those of its own tiles and its own two rows, and nothing goes through shared memory but the copies of resident.cuh.
//
// Weights become fp16 as in stats_any.cuh, each row of a step with a power of two of its own, on which the four lanes
// of a quad agree.
#pragma once
#include "cuda/matrix.h"
#include "cuda/step_scale.cuh"

namespace hf_spqr {

template <int GROUP, int BITS>
class StatsAffineTile {
    static_assert(GROUP == 32 || GROUP == 64);
    static constexpr int kPlace = kSubtractFirst<BITS> ? 12 : 24 - Fields<BITS>::kLow;
    static constexpr int kBack = kPlace - 11;
    static_assert(kBack <= StepScale::kMostBack);

  public:
    static constexpr bool kInteger = false;
    static constexpr bool kSubtract = kSubtractFirst<BITS>;
    static constexpr bool kRowScales = true;
    static constexpr float kFactor = 2048.f;  // of the sums, made up for at the end
    static constexpr int kRowBlocks = 1;      // of a warp
    static constexpr int kTileShift = GROUP == 64 ? 6 : 5;
    static constexpr int kSharedWords = 0;
    static HF_CONSTANT int shared_words(const Matrix&) { return 0; }

    HF_DEVICE StatsAffineTile(const Matrix& m, const uint32_t* stream, int lane, int, int, uint32_t) : m_(m) {
        const int t = lane & 3;
        stream_ = dev::keep(stream + 2 * (lane >> 2));
        vector_ = GROUP == 32 ? t >> 1 : 0;
        odd_ = GROUP == 32 ? t & 1 : t >> 1;
        // The half of a word of scales as bf16 in a float, or as fp16 below.
        select_ = dev::keep(m.scale_bf16 ? (odd_ ? 0x3244u : 0x1044u) : (odd_ ? 0x4432u : 0x4410u));
        mask_ = dev::keep(m.symmetric ? 0 : Fields<BITS>::kMask);
        middle_ = dev::keep(m.symmetric ? 1u << (BITS - 1) : 0);
        slot_at_ = 8 * (lane >> 2);
    }

    // Of a step, on their way.
    HF_DEVICE void prefetch(int step) {
        const Panels& p = m_.panels;
        const int panel = step / kSteps, in_panel = step % kSteps, offset = panel * p.panel_words;
        const int stat_words = panel == p.last_panel ? p.last_stat_words : p.stat_words;
        const int scale = in_panel * kScaleWords + vector_ * kRows;
        const int left = scale_words(m_, stat_words) - scale;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            scales_[h] = make_uint2(0, 0);
            if (h * kScaleWords / 2 < left) scales_[h] = load(offset + scale + h * kScaleWords / 2);
        }
        if (m_.symmetric) return;
#pragma unroll
        for (int v = 0; v < kZeroVectors; ++v) {
            zeros_[v] = load(offset + stat_words + (zero_vector(in_panel) + v - BITS) * kRows);
        }
    }

    HF_DEVICE void decode(int step) { decode_for(step, {}); }
    // Each factor() is at least as large as here.
    HF_DEVICE void decode(int step, const float (&least)[2]) {
        decode_for(step, {dev::mul(least[0], float(1 << (14 - kBack))), dev::mul(least[1], float(1 << (14 - kBack)))});
    }

    // --- for resident.cuh: statistics of a step are in a slot, scales first ---

    static constexpr int kScaleWords = kStepColumns / GROUP / 2 * kRows;
    static constexpr int kZeroVectors = BITS == 3 ? 3 : BITS == 8 && GROUP == 32 ? 2 : 1;  // that a step needs
    static constexpr int kRingBytes = (kScaleWords + kZeroVectors * kRows) * 4;

    // What the panel does not have becomes zero. lane_words = 4 * lane.
    template <int TO>
    static HF_DEVICE void fetch(const Matrix& m, const uint32_t* stream, uint32_t panel, int stat_words, int in_panel,
                                uint32_t slot, int lane_words) {
        if (lane_words >= (m.symmetric ? kScaleWords : kRingBytes / 4)) return;
        const int scale = in_panel * kScaleWords + lane_words;
        const int zero = stat_words + (zero_vector(in_panel) - BITS) * kRows + lane_words - kScaleWords;
        const bool of_scale = lane_words < kScaleWords;
        dev::copy_stream<TO, 0>(slot + 4 * lane_words, stream + (panel + uint32_t(of_scale ? scale : zero)),
                                !of_scale || scale < scale_words(m, stat_words));
    }
    HF_DEVICE void begin(const uint32_t*) {}
    HF_DEVICE void take(uint32_t slot, int) {
        slot += slot_at_;
        scales_[0] = dev::load_shared2<0>(slot + vector_ * (4 * kRows));
        scales_[1] = dev::load_shared2<2 * kScaleWords>(slot + vector_ * (4 * kRows));
        zeros_[0] = dev::load_shared2<4 * kScaleWords>(slot);
        if constexpr (kZeroVectors > 1) zeros_[1] = dev::load_shared2<4 * (kScaleWords + kRows)>(slot);
        if constexpr (kZeroVectors > 2) zeros_[2] = dev::load_shared2<4 * (kScaleWords + 2 * kRows)>(slot);
    }

    // For the quarters of set H that follow: all have the same.
    template <int H>
    HF_DEVICE void load_set() {
        fill<BITS>(of_set_, make_uint2(words_[H][0], words_[H][1]));
    }
    template <int H, int I>
    HF_DEVICE void quarter(Quarter& q) const {
        q = of_set_;
    }

    // Of the lane's row 2g + r.
    HF_DEVICE float factor(int r) const { return factor_[r]; }

  private:
    static constexpr int kSteps = 1 << (kTileShift - 3);           // of a panel
    static constexpr int kPairs = kStepColumns / GROUP / 2;        // of groups, in a step
    static constexpr int kPerVector = BITS == 3 ? 16 : 16 / BITS;  // pairs of zero codes

    struct TwoRows {
        float of[2];
    };

    static HF_DEVICE int scale_words(const Matrix& m, int stat_words) {
        return stat_words - (m.symmetric ? 0 : BITS * kRows);
    }
    static HF_DEVICE int zero_vector(int in_panel) { return in_panel * kPairs / kPerVector; }
    HF_DEVICE uint2 load(int word) const { return dev::load_stream(reinterpret_cast<const uint2*>(stream_ + word)); }

    HF_DEVICE float scale(uint32_t word) const {
        const uint32_t half = dev::permute_bytes(word, select_);
        return m_.scale_bf16 ? dev::as_float(half) : dev::low_float(half);
    }

    // Of set H and row R, as an fp16 subnormal.
    template <int H, int R>
    HF_DEVICE uint32_t zero(int in_panel) const {
        const auto of_row = [&](int v) { return R ? zeros_[v].y : zeros_[v].x; };
        const int pair = in_panel * kPairs + H * (kPairs / 2) + vector_;
        uint32_t code;
        if constexpr (BITS == 3) {
            code = plain_pair(3, pair, [&](int v) { return v == 0 ? of_row(0) : v == 1 ? of_row(1) : of_row(2); });
            code >>= 16 * odd_;
        } else {
            // Both sets have theirs in one vector, or each in its own.
            constexpr int v = kZeroVectors > 1 ? H : 0;
            const int first = (in_panel * kPairs + vector_) % kPerVector * BITS + 16 * odd_;
            code = of_row(v) >> first >> (kZeroVectors > 1 ? 0 : H * (kPairs / 2) * BITS);
        }
        return (code & mask_) | middle_;
    }

    // `largest` of the lane's rows: at least so large is what is scaled.
    HF_DEVICE void decode_for(int step, TwoRows largest) {
        const int in_panel = step % kSteps;
        decode_row<0>(in_panel, largest.of[0]);
        decode_row<1>(in_panel, largest.of[1]);
    }
    template <int R>
    HF_DEVICE void decode_row(int in_panel, float largest) {
        const float first = scale(R ? scales_[0].y : scales_[0].x), second = scale(R ? scales_[1].y : scales_[1].x);
        largest = fmaxf(largest, fmaxf(fabsf(first), fabsf(second)));
        if (GROUP == 32) largest = fmaxf(largest, dev::shuffle_xor(largest, 1));
        largest = fmaxf(largest, dev::shuffle_xor(largest, 2));
        const StepScale power(dev::as_bits(largest));
        factor_[R] = power.back(kBack);
        words_[0][R] = scale_and_shift(dev::mul(first, power.up()), zero<0, R>(in_panel));
        words_[1][R] = scale_and_shift(dev::mul(second, power.up()), zero<1, R>(in_panel));
    }
    static HF_DEVICE uint32_t scale_and_shift(float scale, uint32_t zero) {
        const float down = dev::mul(dev::low_float(zero), -float(1 << (24 - kPlace)));
        return dev::to_half2(scale, kSubtract ? down : dev::mul(scale, down));
    }

    const Matrix& m_;
    const uint32_t* stream_;
    int vector_, odd_;  // of scales, among those of a set, and half of its words: where the lane's group lies
    uint32_t select_, mask_, middle_, slot_at_;
    uint2 scales_[2], zeros_[kZeroVectors] = {};
    uint32_t words_[2][2];  // of set and row: scale, shift
    Quarter of_set_;
    float factor_[2];
};

}  // namespace hf_spqr
