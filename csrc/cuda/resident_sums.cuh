// The end of a row block in resident.cuh: adds up what the warps of a group have, adds outliers, scales, writes.
//
// Each warp does two rows. Their outliers, whose columns rise, are fetched while the warp still multiplies; where x is
// in shared memory a stretch of columns at a time, a cursor remembers how far a row has come.
#pragma once
#include "cuda/outliers.cuh"
#include "cuda/resident_x.cuh"

namespace hf_spqr {

class GroupSums {
  public:
    HF_DEVICE GroupSums(const ResidentArgs& a, uint32_t shared, const ResidentMap& map, int group, int slice, int lane)
        : a_(a), group_(group), slice_(slice), lane_(lane) {
        unsigned char* memory = dev::shared_memory();
        sums_ = shared + map.sums + group * (2 * kBufferBytes);
        waiting_ = reinterpret_cast<float*>(memory + map.waiting) + group * (kBatch * kRows * kResidentTokens);
        cursors_ = reinterpret_cast<int*>(memory + map.cursors) + group * (kBatch * kRows);
    }

    // A row block, its place among those that wait, and whether this is its first stretch of columns.
    HF_DEVICE void begin(int row_block, int place, bool fresh) {
        row_ = row_block * kRows + 2 * slice_;
        place_ = place * kRows + 2 * slice_;
        fresh_ = fresh;
        fetched_ = false;
        if (a_.weight.outlier) {
            const int row = row_ + lane_ < a_.weight.rows ? row_ + lane_ : a_.weight.rows;
            if (lane_ < 3) bound_ = a_.weight.outlier_row[row];
        }
    }

    HF_DEVICE void fetch_outliers() {
        if (!a_.weight.outlier) return;
        fetched_ = true;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            at_[i] = fresh_ ? dev::shuffle(bound_, i) : cursors_[place_ + i];
            end_[i] = dev::shuffle(bound_, i + 1);
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                const int index = at_[i] + 32 * k + lane_;
                if (index < end_[i]) entries_[i][k] = dev::load_stream(a_.weight.outlier + index);
            }
        }
    }

    // All threads of the group. `total` as the tensor cores leave it: rows 2g, 2g + 1 and tokens 2t, 2t + 1.
    HF_DEVICE void finish(const float (&total)[4], float factor, int first_column, bool last, const ResidentX& x) {
        if (a_.tokens == 1) {
            finish<1>(total, factor, first_column, last, x);
        } else if (a_.tokens == 2) {
            finish<2>(total, factor, first_column, last, x);
        } else if (a_.tokens <= 4) {
            finish<4>(total, factor, first_column, last, x);
        } else {
            finish<8>(total, factor, first_column, last, x);
        }
    }

  private:
    static constexpr int kAhead = 3;  // entries of a row that a lane fetches early
    static constexpr int kBufferBytes = kSlices * kRows * kResidentTokens * 4;

    template <int TOKENS>
    HF_DEVICE void finish(const float (&total)[4], float factor, int first_column, bool last, const ResidentX& x) {
        const int g = lane_ >> 2, t = lane_ & 3;
        const uint32_t mine = sums_ + buffer_ + ((slice_ * kRows + 2 * g) * kResidentTokens + 2 * t) * 4;
        dev::store_shared(mine, make_uint2(dev::as_bits(total[0]), dev::as_bits(total[1])));
        dev::store_shared(mine + kResidentTokens * 4, make_uint2(dev::as_bits(total[2]), dev::as_bits(total[3])));
        float outliers = 0.f;
        if (a_.weight.outlier) {
            if (!fetched_) fetch_outliers();
            const float first = of_row<TOKENS, 0>(first_column, last, x), second = of_row<TOKENS, 1>(first_column, last, x);
            outliers = lane_ & 1 ? second : first;
        }
        dev::sync_group(1 + group_, kGroupThreads);

        // Lanes token * kPerToken + [0, 4): row 0 or 1, lower or upper half of the slices; the others are idle.
        constexpr int kPerToken = 32 / TOKENS;
        const int token = lane_ / kPerToken, i = lane_ & 1, half = lane_ >> 1 & 1;
        uint32_t from = sums_ + buffer_;
        from += ((half * (kSlices / 2) * kRows + 2 * slice_ + i) * kResidentTokens + token) * 4;
        constexpr int kNext = kRows * kResidentTokens * 4;
        float y = dev::add(dev::add(dev::as_float(dev::load_shared<0>(from)), dev::as_float(dev::load_shared<kNext>(from))),
                           dev::add(dev::as_float(dev::load_shared<2 * kNext>(from)),
                                    dev::as_float(dev::load_shared<3 * kNext>(from))));
        y = dev::add(y, dev::shuffle_xor(y, 2));
        buffer_ = kBufferBytes - buffer_;
        const int64_t row = row_ + i;
        if (lane_ % kPerToken > 1 || token >= a_.tokens || row >= a_.weight.rows) return;
        y = dev::fma(y, factor, outliers);
        float& waiting = waiting_[(place_ + i) * kResidentTokens + token];
        if (!fresh_) y = dev::add(waiting, y);
        if (!last) {
            waiting = y;
            return;
        }
        y = dev::mul(y, x.scale(token));
        if (a_.bias) y = dev::add(y, read_as(a_.bias, row, a_.dtype));
        write_as(a_.y, token * int64_t(a_.weight.rows) + row, a_.dtype, y);
    }

    // The sum over row I's outliers among the columns that are here, for token lane / (32 / TOKENS).
    template <int TOKENS, int I>
    HF_DEVICE float of_row(int first_column, bool last, const ResidentX& x) {
        float v[TOKENS] = {};
        const int end_column = first_column + a_.plan.chunk_columns;
        int at = at_[I], here = 32;
        const auto take = [&](uint32_t entry) {
            const int column = int(entry & 0xffffu);
            const bool in = at + lane_ < end_[I] && column < end_column;
            if (in) multiply<TOKENS>(v, dev::high_float(entry), x.column_at(column - first_column));
            here = last ? (at + 32 < end_[I] ? 32 : 0) : dev::count(in);
            at += here;
        };
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (here == 32) take(entries_[I][k]);
        }
        while (here == 32) {
            uint32_t entry = 0;
            if (at + lane_ < end_[I]) entry = dev::load_stream(a_.weight.outlier + at + lane_);
            take(entry);
        }
        if (!last && lane_ == 0) cursors_[place_ + I] = at;
        return sum_tokens(v, lane_);
    }

    template <int TOKENS>
    HF_DEVICE void multiply(float (&v)[TOKENS], float value, uint32_t at) const {
        multiply_token<TOKENS, 0>(v, value, at, at ^ 32);
    }
    template <int TOKENS, int B>
    HF_DEVICE void multiply_token(float (&v)[TOKENS], float value, uint32_t even, uint32_t odd) const {
        const uint32_t x = dev::load_shared_half<B * kTokenBytes>(B & 1 ? odd : even);
        v[B] = dev::fma(value, dev::low_float(x), v[B]);
        if constexpr (B + 1 < TOKENS) multiply_token<TOKENS, B + 1>(v, value, even, odd);
    }

    const ResidentArgs& a_;
    int group_, slice_, lane_;
    uint32_t sums_, buffer_ = 0;
    float* waiting_;
    int* cursors_;
    int row_, place_, bound_ = 0, at_[2], end_[2];
    bool fresh_, fetched_;
    uint32_t entries_[2][kAhead];
};

}  // namespace hf_spqr
