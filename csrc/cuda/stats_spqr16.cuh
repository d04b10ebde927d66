// Statistics of SpQR's usual layout: groups of 16 columns, 3-bit scale and zero codes. A step of 256 columns is a
// panel.
//
// A tile holds two groups; a lane decodes one row of four tiles, chosen so that for the two halves of the warp the
// codes lie at the same places up to a shift by two fields: lane r of the first half tiles 0, 2, 5, 3, lane 16 + r
// tiles 1, 4, 6, 7. It leaves (s of group 0, s of group 1) and (-s z, -s z) as half2 in shared memory.
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
    static constexpr bool kSubtract = kSubtractFirst<BITS>;
    static constexpr bool kRowScales = false;
    static constexpr float kFactor = 1.f;  // of the sums, made up for at the end
    static constexpr int kRowBlocks = 1;   // of a warp
    static constexpr int kTileShift = 3;   // log2 of the tiles of a panel
    static constexpr int kTileWords = 40;  // 16 rows x 2, and room so that four tiles do not meet in a bank
    static constexpr int kSharedWords = 9 * kTileWords + 2 * 36;
    static HF_CONSTANT int shared_words(const Matrix&) { return kSharedWords; }

    HF_DEVICE StatsSpqr16(const Matrix& m, const uint32_t* stream, int lane, int first_step, int stride,
                          uint32_t shared) {
        const int h = lane >> 4, row = lane & 15, t = lane & 3, g = lane >> 2;
        const uint32_t* panel = stream + first_step * m.panels.panel_words;
        step_words_ = stride * m.panels.panel_words;
        codes_at_ = dev::keep(panel + row);
        second_at_ = dev::keep(panel + 3 * kRows + 2 * (m.groups_per_second == 2 ? row >> 1 : row));
        // Lane l < 16 has group l of the panel, the others have none and write their constants where nobody looks.
        left_ = lane < 16 ? m.panels.groups - 16 * first_step - lane : INT32_MIN / 2;
        step_groups_ = 16 * stride;
        shift_ = int(dev::pin(6 * h));
        const uint32_t constants = shared + 9 * kTileWords * 4;
        constants_out_ = dev::keep(constants + h * 144 + place(row >> 1) * 16 + (row & 1) * 8);
        constants_in_ = dev::keep(constants + h * 16);
        slot_codes_ = 4 * row;
        slot_second_ = 8 * (m.groups_per_second == 2 ? row >> 1 : row);
        eighth_ = dev::as_float(dev::keep(dev::as_bits(row & 1 ? 0.125f : 1.f)));
        out_ = dev::keep(shared + h * (kTileWords * 4) + row * 8);
        in_[0] = dev::keep(shared + place(t) * (kTileWords * 4) + 16 * g);
        in_[1] = dev::keep(shared + place(4 + t) * (kTileWords * 4) + 16 * g);
        bias_ = dev::keep(0x64006400u);  // fp16 1024, as both halves
    }

    // The slice's next panel.
    HF_DEVICE void prefetch(int) {
#pragma unroll
        for (int v = 0; v < 3; ++v) codes_[v] = dev::load_stream(codes_at_ + v * kRows);
        second_ = make_uint2(0, 0);
        if (left_ > 0) second_ = dev::load_stream(reinterpret_cast<const uint2*>(second_at_));
        codes_at_ = dev::keep(codes_at_ + step_words_);
        second_at_ = dev::keep(second_at_ + step_words_);
        left_ -= step_groups_;
    }

    HF_DEVICE void decode(int) { decode_for(largest()); }
    // Likewise, and numbers up to `fit` fit fp16 as weights do, divided by factor().
    HF_DEVICE void decode(int, float fit) {
        decode_for(fmaxf(largest(), dev::mul(fit, 1.f / float(1 << (24 - Fields<BITS>::kLow)))));
    }

    // --- for resident.cuh: statistics of a step are in a slot ---

    static constexpr int kRingBytes = (3 + 2) * kRows * 4;

    // Of a step of the panel at `panel` of the row block, to byte TO of the slot; what the panel does not have becomes
    // zero. lane_words = 4 * lane.
    template <int TO>
    static HF_DEVICE void fetch(const Matrix&, const uint32_t* stream, uint32_t panel, int stat_words, int,
                                uint32_t slot, int lane_words) {
        if (4 * lane_words >= kRingBytes) return;
        dev::copy_stream<TO, 0>(slot + 4 * lane_words, stream + (panel + lane_words), lane_words < stat_words);
    }
    HF_DEVICE void begin(const uint32_t*) {}
    HF_DEVICE void take(uint32_t slot, int) {
        codes_[0] = dev::load_shared<0>(slot + slot_codes_);
        codes_[1] = dev::load_shared<4 * kRows>(slot + slot_codes_);
        codes_[2] = dev::load_shared<8 * kRows>(slot + slot_codes_);
        second_ = dev::load_shared2<12 * kRows>(slot + slot_second_);
    }

    // For the quarters of set H that follow.
    template <int H>
    HF_DEVICE void load_set() {
        words_ = dev::load_shared4<0>(in_[H]);
        small_[0] = dev::hmul2(words_.x, kSmall);
        small_[1] = dev::hmul2(words_.z, kSmall);
    }

    // Of the lane's rows 2g, 2g + 1 in its tile 4 H + t.
    template <int H, int I>
    HF_DEVICE void quarter(Quarter& q) {
        q.low[0] = pick<I>(words_.x);
        q.low[1] = pick<I>(words_.z);
        q.high[0] = pick<I>(small_[0]);
        q.high[1] = pick<I>(small_[1]);
        q.shift[0] = pick<I>(words_.y);
        q.shift[1] = pick<I>(words_.w);
    }

    HF_DEVICE float factor(int) const { return factor_; }

  private:
    static constexpr int kZero = Fields<BITS>::kLow - 8;
    static constexpr uint32_t kSmall = half2_power(Fields<BITS>::kLow - Fields<BITS>::kHigh);

    // Where a tile's statistics lie, in units of kTileWords: 0, 2, 5, 7 for the first half of the warp's slots, one
    // further for the second half's. Four neighbouring tiles then lie in different banks.
    static HF_DEVICE int place(int tile) { return int(0x86537210u >> 4 * tile & 15); }
    static HF_CONSTANT int slot_place(int slot) { return slot == 0 ? 0 : slot == 1 ? 2 : slot == 2 ? 5 : 7; }

    template <int I>
    static HF_DEVICE uint32_t pick(uint32_t both) {
        return I < 2 ? dev::low_twice(both) : dev::high_twice(both);
    }

    // At least |s| of group `lane`.
    HF_DEVICE float largest() const {
        const float ss = dev::low_float(second_.x), sz = dev::high_float(second_.x);
        return dev::mul(fabsf(ss), fmaxf(fabsf(sz), fabsf(7.f - sz)));
    }

    HF_DEVICE void decode_for(float largest) {
        put_constants(largest);
        dev::sync_warp();
        const uint32_t w0 = codes_[0], w1 = codes_[1], w2 = codes_[2];
        const uint32_t spare = (w0 >> 12 & 0x00080008u) | (w1 >> 11 & 0x00100010u) | (w2 >> 10 & 0x00200020u);
        slot<0>(w0 >> shift_, w0 >> shift_);
        slot<1>(w1 >> shift_, w1 >> shift_);
        slot<2>(w2 >> shift_, w2 >> shift_);
        const bool upper = shift_ != 0;
        slot<3>((upper ? w2 : w0) >> 12, upper ? spare : w1 >> 9);
    }

    // The second level of group `lane` for (s, z) = code * first + second, z as -z * 2^kZero, so that s * 2^-16 times
    // it is the shift. The second group of a tile has its codes times 8.
    HF_DEVICE void put_constants(float largest) {
        const float ss = dev::low_float(second_.x), sz = dev::high_float(second_.x);
        const float zs = dev::low_float(second_.y), zz = dev::high_float(second_.y);
        const StepScale scale(dev::max_of_warp(dev::as_bits(largest)));
        factor_ = scale.back(24 - Fields<BITS>::kLow);
        const float up = dev::mul(ss, scale.up()), down = dev::mul(zs, -dev::as_float(uint32_t(127 + kZero) << 23));
        const uint32_t first = dev::to_half2(dev::mul(up, eighth_), dev::mul(down, eighth_));
        const uint32_t second = dev::to_half2(dev::mul(-up, sz), dev::mul(-down, zz));
        dev::store_shared(constants_out_, make_uint2(first, second));
    }

    // Both groups of the lane's tile of SLOT; codes in bits 0-2 of `even` and 3-5 of `odd`.
    template <int SLOT>
    HF_DEVICE void slot(uint32_t even, uint32_t odd) {
        const uint4 c = dev::load_shared4<slot_place(SLOT) * 16>(constants_in_);
        const uint32_t q0 = dev::hadd2(dev::mask_or<0x00070007u>(even, bias_), 0xe400e400u);  // 1024 + q - 1024
        const uint32_t q1 = dev::hadd2(dev::mask_or<0x00380038u>(odd, bias_), 0xe400e400u);   // 8 q
        const uint32_t first = dev::hfma2(q0, c.x, c.y), second = dev::hfma2(q1, c.z, c.w);
        const uint32_t s = dev::low_halves(first, second), z = dev::high_halves(first, second);
        const uint32_t shift = dev::hmul2(dev::hmul2(s, half2_power(-16)), z);
        dev::store_shared(out_ + slot_place(SLOT) * (kTileWords * 4), make_uint2(s, shift));
    }

    const uint32_t *codes_at_, *second_at_;
    int step_words_, step_groups_, left_, shift_;
    uint32_t slot_codes_, slot_second_;
    float eighth_;
    uint32_t constants_out_, constants_in_, out_, in_[2], bias_;
    uint32_t codes_[3] = {};
    uint2 second_{};
    uint4 words_;
    uint32_t small_[2];
    float factor_;
};

}  // namespace hf_spqr
