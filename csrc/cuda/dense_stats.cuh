// Scale and zero point of a thread's row for dequantize.cuh, and what they make of codes.
#pragma once
#include "cuda/stats_any.cuh"
#include "cuda/tile.cuh"

namespace hf_spqr {

// scale * (code - zero), each step rounded as in the reference. Codes are used where they lie in a word, at bit F:
// powers of two make up for that, which changes nothing in what is rounded.
template <Format FORMAT>
class DenseGroup;

// A code at bit F is the fp32 subnormal code * 2^(F - 149), so one fused multiply-add gives (code - zero) * 2^-22 with
// the one rounding that code - zero has. fp16 second levels are far from the ends of what fp32 holds.
template <>
class DenseGroup<Format::spqr> {
  public:
    HF_DEVICE explicit DenseGroup(ScaleZero sz)
        : scale_(dev::mul(sz.scale, 4194304.f)), shift_(dev::mul(sz.zero, -1.f / 4194304.f)) {}

    template <int BITS, int F>
    HF_DEVICE float value(uint32_t word) const {
        constexpr uint32_t kPower = uint32_t(127 - F + 127) << 23;  // 2^(127 - F)
        const float code = dev::as_float(word & Fields<BITS>::kMask << F);
        return dev::mul(scale_, dev::fma(code, dev::as_float(kPower), shift_));
    }

  private:
    float scale_, shift_;
};

// Zero points are integers: with the code as the last bits of 2^(23 - F), code - zero is a difference of two integers,
// which is exact; and the scale, which may be any bf16, stays as it is.
template <>
class DenseGroup<Format::affine> {
  public:
    HF_DEVICE explicit DenseGroup(ScaleZero sz) : sz_(sz) {}

    template <int BITS, int F>
    HF_DEVICE float value(uint32_t word) const {
        const uint32_t code = dev::mask_or<Fields<BITS>::kMask << F>(word, dev::keep(uint32_t(150 - F) << 23));
        return dev::mul(sz_.scale, dev::add(dev::as_float(code), dev::add(-float(1 << (23 - F)), -sz_.zero)));
    }

  private:
    ScaleZero sz_;
};

// Any layout: group by group, as the quarters of a tile come to them.
template <Format FORMAT>
class DenseStats {
  public:
    // Of row `row` in tiles `tile` and tile + 4; the place of `tile` in its eight is the same in all of a warp.
    HF_DEVICE DenseStats(const Matrix& m, const uint32_t* stream, int tile, int, int row)
        : reader_(m, stream), shift_(m.panels.group_shift), groups_(m.panels.groups), tile_(tile), row_(row) {}

    // Of tile + 4 * pass. Called in order.
    template <int I>
    HF_DEVICE DenseGroup<FORMAT> quarter(int pass) {
        const int column = (tile_ + 4 * pass) * kColumns + 8 * I, group = column >> shift_;
        // Past the end there are none, and nobody looks.
        if (group != group_ && group < groups_) sz_ = reader_.read(group_ = group, row_);
        return DenseGroup<FORMAT>(sz_);
    }

  private:
    StatReader<FORMAT> reader_;
    int shift_, groups_, tile_, row_, group_ = -1;
    ScaleZero sz_{};
};

// SpQR's usual layout, groups of 16 columns with 3-bit statistics: all is fetched at once.
class DenseStatsSpqr16 {
  public:
    HF_DEVICE DenseStatsSpqr16(const Matrix& m, const uint32_t* stream, int tile, int in_eight, int row)
        : in_panel_(in_eight) {
        const Panels& p = m.panels;
        const uint32_t* panel = stream + (tile >> 3) * p.panel_words;
        // The last panel may have fewer groups: then tiles follow, at least two vectors, so nothing is read beyond the
        // row block; and what is no statistics, nobody uses.
#pragma unroll
        for (int v = 0; v < 3; ++v) codes_[v] = dev::load_stream(panel + (row + v * kRows));
        const uint2* second =
            reinterpret_cast<const uint2*>(panel + (tile >> 3 == p.last_panel ? p.last_code_words : p.code_words));
        const bool shared = m.groups_per_second == 2;
        second += shared ? in_panel_ : 2 * in_panel_;
        const int one = shared ? 0 : 1, eight = shared ? 4 : 8;
        second_[0] = dev::load_stream(second);
        second_[1] = dev::load_stream(second + one);
        second_[2] = dev::load_stream(second + eight);
        second_[3] = dev::load_stream(second + (eight + one));
    }

    template <int I>
    HF_DEVICE DenseGroup<Format::spqr> quarter(int pass) {
        if constexpr (I % 2 == 0) {
            const int i = 2 * pass + I / 2;
            const uint32_t pair = plain_pair(3, 2 * in_panel_ + 8 * pass + I / 2, [&](int v) {
                return v == 0 ? codes_[0] : v == 1 ? codes_[1] : codes_[2];
            });
            sz_ = spqr_scale_zero(pair, second_[i]);
        }
        return DenseGroup<Format::spqr>(sz_);
    }

  private:
    int in_panel_;
    uint32_t codes_[3];
    uint2 second_[4];
    ScaleZero sz_{};
};

}  // namespace hf_spqr
