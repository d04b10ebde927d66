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
        sums_ = shared + map.sums + group * (2 * kSlices * kRows * ResidentMap::padded(a.tokens) * 4);
        waiting_ =
            reinterpret_cast<float*>(memory + map.waiting) + group * (kBatch * kRows * ResidentMap::padded(a.tokens));
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
        at_[0] = dev::shuffle(bound_, 0);
        at_[1] = end_[0] = dev::shuffle(bound_, 1);
        end_[1] = dev::shuffle(bound_, 2);
        if (!fresh_) {
            at_[0] = cursors_[place_];
            at_[1] = cursors_[place_ + 1];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                const int index = at_[i] + 32 * k + lane_;
                if (index < end_[i]) entries_[i][k] = dev::load_stream(a_.weight.outlier + index);
            }
        }
    }

    // All threads of the group. `total` as the tensor cores leave it: rows 2g, 2g + 1 and tokens 2t, 2t + 1 of each
    // eight.
    template <int NT>
    HF_DEVICE void finish(const float (&total)[NT][4], float factor, int first_column, bool last, const ResidentX& x) {
        if constexpr (NT > 1) {
            finish_tokens<8 * NT>(total, factor, first_column, last, x);
        } else if (a_.tokens == 1) {
            finish_tokens<1>(total, factor, first_column, last, x);
        } else if (a_.tokens == 2) {
            finish_tokens<2>(total, factor, first_column, last, x);
        } else if (a_.tokens <= 4) {
            finish_tokens<4>(total, factor, first_column, last, x);
        } else {
            finish_tokens<8>(total, factor, first_column, last, x);
        }
    }

  private:
    static constexpr int kAhead = 3;  // entries of a row that a lane fetches early

    template <int TOKENS, int NT>
    HF_DEVICE void finish_tokens(const float (&total)[NT][4], float factor, int first_column, bool last,
                                 const ResidentX& x) {
        constexpr int kPadded = ResidentMap::padded(TOKENS), kBufferBytes = kSlices * kRows * kPadded * 4;
        const int g = lane_ >> 2, t = lane_ & 3;
        if (2 * t < kPadded) {
            const uint32_t mine = sums_ + buffer_ + ((slice_ * kRows + 2 * g) * kPadded + 2 * t) * 4;
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                const float (&of)[4] = total[j];
                dev::store_shared(mine + 32 * j, make_uint2(dev::as_bits(of[0]), dev::as_bits(of[1])));
                dev::store_shared(mine + kPadded * 4 + 32 * j, make_uint2(dev::as_bits(of[2]), dev::as_bits(of[3])));
            }
        }
        float outliers = 0.f;
        if (a_.weight.outlier) {
            if (!fetched_) fetch_outliers();
            float v[2 * TOKENS] = {};
            const bool all = fresh_ && last;
            of_row<TOKENS, 0>(v, first_column, all, x);
            of_row<TOKENS, 1>(v, first_column, all, x);
            outliers = sum_each(v, lane_);
        }
        dev::sync_group(1 + group_, kGroupThreads);

        // Lanes 16 * row + kPerToken * token + [0, kPerToken): as many as there are slices, or each takes some of
        // them.
        constexpr int kPerToken = 16 / TOKENS, kSummers = kPerToken < kSlices ? kPerToken : kSlices;
        const int i = lane_ >> 4, token = (lane_ & 15) / kPerToken, slice = lane_ % kSummers;
        const uint32_t from = sums_ + buffer_ + ((slice * kRows + 2 * slice_ + i) * kPadded + token) * 4;
        float y = sum_slices<kSummers * kRows * kPadded * 4, kSlices / kSummers>(from);
#pragma unroll
        for (int mask = 1; mask < kSummers; mask *= 2) y = dev::add(y, dev::shuffle_xor(y, mask));
        buffer_ = kBufferBytes - buffer_;
        const int64_t row = row_ + i;
        if (lane_ % kPerToken != 0 || token >= a_.tokens || row >= a_.weight.rows) return;
        y = dev::fma(y, factor, outliers);
        float& waiting = waiting_[(place_ + i) * kPadded + token];
        if (!fresh_) y = dev::add(waiting, y);
        if (!last) {
            waiting = y;
            return;
        }
        y = dev::mul(y, x.scale(token));
        if (a_.bias) y = dev::add(y, read_as(a_.bias, row, a_.dtype));
        write_as(a_.y, token * int64_t(a_.weight.rows) + row, a_.dtype, y);
    }

    template <int STRIDE, int COUNT>
    static HF_DEVICE float sum_slices(uint32_t at) {
        const float first = dev::as_float(dev::load_shared<STRIDE*(COUNT - 1)>(at));
        if constexpr (COUNT == 1) {
            return first;
        } else {
            return dev::add(sum_slices<STRIDE, COUNT - 1>(at), first);
        }
    }

    // v[I * TOKENS + b] += the lane's share of row I's outliers, for token b. `all`: all columns are here; otherwise
    // those up to the next stretch of columns, where the cursor then stands.
    template <int TOKENS, int I>
    HF_DEVICE void of_row(float (&v)[2 * TOKENS], int first_column, bool all, const ResidentX& x) {
        const uint32_t* entry_of = a_.weight.outlier;
        if (all) {
            const int index = at_[I] + lane_;
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                if (index + 32 * k < end_[I]) multiply<TOKENS, I>(v, entries_[I][k], 0, x);
            }
            for (int i = index + 32 * kAhead; i < end_[I]; i += 32) {
                multiply<TOKENS, I>(v, dev::load_stream(entry_of + i), 0, x);
            }
            return;
        }
        const uint32_t end_column = uint32_t(first_column + a_.plan.chunk_columns);
        int at = at_[I], here = 32;
        for (int k = 0; here == 32; ++k) {
            uint32_t entry = k == 0 ? entries_[I][0] : 0;
            bool in = at + lane_ < end_[I];
            if (in && k > 0) entry = dev::load_stream(entry_of + at + lane_);
            in = in && (entry & 0xffffu) < end_column;
            if (in) multiply<TOKENS, I>(v, entry, uint32_t(first_column), x);
            here = dev::count(in);
            at += here;
        }
        if (lane_ == 0) cursors_[place_ + I] = at;
    }

    template <int TOKENS, int I>
    HF_DEVICE void multiply(float (&v)[2 * TOKENS], uint32_t entry, uint32_t first_column, const ResidentX& x) const {
        const uint32_t at = x.template column_at<TOKENS>((entry & 0xffffu) - first_column);
        multiply_token<TOKENS, I, 0>(v, dev::high_float(entry), at, at ^ 32);
    }
    template <int TOKENS, int I, int B>
    HF_DEVICE void multiply_token(float (&v)[2 * TOKENS], float value, uint32_t even, uint32_t odd) const {
        const uint32_t x = dev::load_shared_half<B * kTokenBytes>(B & 1 ? odd : even);
        float& sum = v[I * TOKENS + B];
        sum = dev::fma(value, dev::low_float(x), sum);
        if constexpr (B + 1 < TOKENS) multiply_token<TOKENS, I, B + 1>(v, value, even, odd);
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
