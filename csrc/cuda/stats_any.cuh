// Statistics of any layout, at run time: what has no faster way of its own. Each lane decodes some (group, row) of the
// step in fp32 and leaves (s, shift) as half2 in shared memory. Scaling as in stats_spqr16.cuh, but row by row for
// affine layouts, whose rows have nothing in common: none is spoiled by the scales of another.
#pragma once
#include "cuda/matrix.h"
#include "cuda/step_scale.cuh"

namespace hf_spqr {

struct ScaleZero {
    float scale, zero;
};

// From the codes of a group and row, scale code in the low half, and its second level.
HF_DEVICE ScaleZero spqr_scale_zero(uint32_t codes, uint2 second) {
    const float ss = dev::low_float(second.x), sz = dev::high_float(second.x);
    const float zs = dev::low_float(second.y), zz = dev::high_float(second.y);
    return {dev::mul(ss, dev::add(float(codes & 0xffffu), -sz)), dev::mul(zs, dev::add(float(codes >> 16), -zz))};
}

// A row block's statistics, group by group. FORMAT is known at compile time, all the rest is not.
template <Format FORMAT>
class StatReader {
  public:
    HF_DEVICE StatReader(const Matrix& m, const uint32_t* stream) : m_(m), stream_(stream) {}

    // s and z of one group and row.
    HF_DEVICE ScaleZero read(int group, int row) const {
        if constexpr (FORMAT == Format::spqr) {
            const uint32_t* panel = stream_ + (group >> 4) * m_.panels.panel_words;
            return spqr_scale_zero(code_pair(m_.stat_bits, group & 15, panel, row), second(group));
        } else {
            const int in_panel = group & 31;
            const uint32_t* panel = stream_ + (group >> 5) * m_.panels.panel_words;
            const float middle = float(1 << (m_.bits - 1));
            if (m_.group == kPerChannel) {
                const uint32_t word = panel[row];
                return {half_float(word & 0xffffu), m_.symmetric ? middle : float(word >> 16)};
            }
            const float s = scale_of(group, row);
            if (m_.symmetric) return {s, middle};
            const int here = group >> 5 == m_.panels.last_panel ? m_.panels.groups - (group & ~31) : 32;
            const uint32_t pair = code_pair(m_.bits, in_panel >> 1, panel + (here + 1) / 2 * kRows, row);
            return {s, float(in_panel & 1 ? pair >> 16 : pair & 0xffffu)};
        }
    }

    // At least |s| of that group and row.
    HF_DEVICE float bound(int group, int row) const {
        if constexpr (FORMAT == Format::spqr) {
            const uint2 four = second(group);
            const float sz = dev::high_float(four.x), most = float((1 << m_.stat_bits) - 1);
            return dev::mul(fabsf(dev::low_float(four.x)), fmaxf(fabsf(sz), fabsf(most - sz)));
        } else {
            return fabsf(scale_of(group, row));
        }
    }

  private:
    HF_DEVICE uint2 second(int group) const {
        const Panels& p = m_.panels;
        const int codes = group >> 4 == p.last_panel ? p.last_code_words : p.code_words;
        const uint32_t* panel = stream_ + (group >> 4) * p.panel_words + codes;
        const int entry = m_.groups_per_second == 2 ? (group & 15) >> 1 : group & 15;
        return reinterpret_cast<const uint2*>(panel)[entry];
    }

    HF_DEVICE float scale_of(int group, int row) const {
        const uint32_t* panel = stream_ + (group >> 5) * m_.panels.panel_words;
        if (m_.group == kPerChannel) return half_float(panel[row] & 0xffffu);
        const uint32_t word = panel[(group & 31) / 2 * kRows + row];
        return half_float(group & 1 ? word >> 16 : word & 0xffffu);
    }

    HF_DEVICE float half_float(uint32_t half) const {
        return m_.scale_bf16 ? dev::as_float(half << 16) : dev::low_float(half);
    }

    const Matrix& m_;
    const uint32_t* stream_;
};

template <Format FORMAT, int BITS>
class StatsAny {
    // Of a group's 16 rows in shared memory, with room so that the groups of a quad's four tiles lie in different
    // banks.
    static HF_CONSTANT int group_bytes(int shift) { return kRows * 4 + (shift < 5 ? 1 << shift : 32); }

    static constexpr int kPlace = kSubtractFirst<BITS> ? 12 : 24 - Fields<BITS>::kLow;

  public:
    static constexpr bool kInteger = false;
    static constexpr bool kSubtract = kSubtractFirst<BITS>;
    static constexpr bool kRowScales = FORMAT == Format::affine;  // each row has a power of two of its own
    static constexpr float kFactor = kRowScales ? 2048.f : 1.f;   // of the sums, made up for at the end
    static constexpr int kBack = kRowScales ? kPlace - 11 : kPlace;
    static constexpr int kRowBlocks = 1;   // of a warp
    static constexpr int kTileShift = -1;  // as the matrix says
    static constexpr int kSharedWords = 32 * group_bytes(3) / 4;
    static HF_CONSTANT int shared_words(const Matrix& m) {
        return groups_of_step(m) * group_bytes(m.panels.group_shift) / 4;
    }

    HF_DEVICE StatsAny(const Matrix& m, const uint32_t* stream, int lane, int, int, uint32_t shared)
        : m_(m), reader_(m, stream), lane_(lane), group_bytes_(group_bytes(m.panels.group_shift)), shared_(shared) {}

    HF_DEVICE void prefetch(int) {}

    HF_DEVICE void decode(int step) { decode_for(step, 0.f); }
    // Numbers up to `fit` fit fp16 as weights do, divided by factor().
    HF_DEVICE void decode(int step, float fit) { decode_for(step, dev::mul(fit, 1.f / float(1 << kPlace))); }
    // kRowScales: each factor() is at least as large as here.
    HF_DEVICE void decode(int step, const float (&least)[2]) {
        const int row = lane_ & 15, from = row / 2 * 4;
        const float even = dev::shuffle(least[0], from), odd = dev::shuffle(least[1], from);
        decode_for(step, dev::mul(row & 1 ? odd : even, float(1 << (14 - kBack))));
    }

    template <int H>
    HF_DEVICE void load_set() {}

    template <int H, int I>
    HF_DEVICE void quarter(Quarter& q) {
        const int group = (column_ + 4 * H * kColumns + 8 * I) >> m_.panels.group_shift;
        fill<BITS>(q, dev::load_shared2<0>(groups_ + group * group_bytes_));
    }

    // Of the lane's row 2g + r.
    HF_DEVICE float factor(int r) const { return factor_[kRowScales ? r : 0]; }

  private:
    // `largest`: at least so large is what is scaled, of row lane % 16 if rows have scales of their own.
    HF_DEVICE void decode_for(int step, float largest) {
        const int shift = m_.panels.group_shift, first = step * kStepColumns >> shift;
        const int full = groups_of_step(m_), left = m_.panels.groups - first;
        const int groups = full < left ? full : left, row = lane_ & 15;
        // Made from the step, so that the places of its quarters are not kept in registers throughout.
        column_ = step * kStepColumns + (lane_ & 3) * kColumns;
        groups_ = shared_ + (lane_ >> 2) * 8 - first * group_bytes_;
        if constexpr (kRowScales) {
            for (int i = lane_ >> 4; i < groups; i += 2) largest = fmaxf(largest, reader_.bound(first + i, row));
            largest = fmaxf(largest, dev::shuffle_xor(largest, 16));
        } else {  // the same for all rows, and at most 32 groups
            if (lane_ < groups) largest = fmaxf(largest, reader_.bound(first + lane_, row));
            largest = dev::as_float(dev::max_of_warp(dev::as_bits(largest)));
        }
        const StepScale scale(dev::as_bits(largest));
        const float back = scale.back(kBack);
#pragma unroll
        for (int r = 0; r < (kRowScales ? 2 : 1); ++r) {
            factor_[r] = kRowScales ? dev::shuffle(back, lane_ / 4 * 2 + r) : back;
        }
        for (int i = lane_ >> 4; i < full; i += 2) {
            uint32_t word = 0;
            if (i < groups) {
                const ScaleZero sz = reader_.read(first + i, row);
                const float s = dev::mul(sz.scale, scale.up());
                const float z = dev::mul(sz.zero, dev::as_float(uint32_t(127 - kPlace) << 23));
                word = dev::to_half2(s, kSubtract ? -z : -dev::mul(s, z));
            }
            dev::store_shared(shared_ + i * group_bytes_ + row * 4, word);
        }
    }

    static_assert(!kRowScales || kBack <= StepScale::kMostBack);

    static HF_CONSTANT int groups_of_step(const Matrix& m) {
        return m.panels.group_shift < 8 ? kStepColumns >> m.panels.group_shift : 1;
    }

    const Matrix& m_;
    StatReader<FORMAT> reader_;
    int lane_, group_bytes_;
    int column_;  // of the lane's tile of set 0 of the step
    uint32_t shared_, groups_;
    float factor_[kRowScales ? 2 : 1];
};

}  // namespace hf_spqr
