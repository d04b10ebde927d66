// The end of a row block in resident.cuh: adds up what the warps of a group have, adds outliers, scales, writes.
//
// Each warp does two rows. Their outliers lie one after the other and are fetched before the warp multiplies. Where x
// is in shared memory a stretch of columns at a time, a cursor remembers how far a row has come, as its columns rise.
#pragma once
#include "cuda/outliers.cuh"
#include "cuda/resident_x.cuh"

namespace hf_spqr {

class GroupSums {
    static_assert(4 * kBatch == 32, "a lane for each bound of a batch");

  public:
    HF_DEVICE GroupSums(const ResidentArgs& a, uint32_t shared, const ResidentMap& map, int group, int slice, int lane)
        : a_(a), group_(group), slice_(slice), lane_(lane), stretches_(a.plan.chunk_columns < a.weight.columns) {
        unsigned char* memory = dev::shared_memory();
        const int padded = ResidentMap::padded(a.tokens), g = lane >> 2, t = lane & 3;
        const uint32_t sums = shared + map.sums + group * (2 * kSlices * kRows * padded * 4);
        put_at_ = dev::pin(sums + ((slice * kRows + 2 * g) * padded + 2 * t) * 4);
        const int per_token = a.tokens == 1 ? 16 : 16 / padded;
        const int summer = lane % (per_token < kSlices ? per_token : kSlices);
        get_at_ = dev::pin(sums + ((summer * kRows + 2 * slice + (lane >> 4)) * padded + (lane & 15) / per_token) * 4);
        waiting_ = reinterpret_cast<float*>(memory + map.waiting) + group * (kBatch * kRows * padded);
        cursors_ = reinterpret_cast<int*>(memory + map.cursors) + group * (kBatch * kRows);
    }

    // kBatch row blocks, the first of them `row_block`, every `stride`-th: lane 4 i + k gets where the outliers of row
    // k begin in the i-th.
    HF_DEVICE void begin_batch(int row_block, int stride) {
        if (!a_.weight.outlier) return;
        const int64_t row = int64_t(row_block + lane_ / 4 * stride) * kRows + 2 * slice_ + lane_ % 4;
        bound_ = a_.weight.outlier_row[row < a_.weight.rows ? row : a_.weight.rows];
    }

    // A row block, its place in the batch, and whether this is its first stretch of columns.
    HF_DEVICE void begin(int row_block, int place, bool fresh) {
        row_ = row_block * kRows + 2 * slice_;
        place_ = place * kRows + 2 * slice_;
        fresh_ = fresh;
        if (!a_.weight.outlier) return;
        begin_ = dev::shuffle(bound_, 4 * place);
        middle_ = dev::shuffle(bound_, 4 * place + 1);
        end_ = dev::shuffle(bound_, 4 * place + 2);
        if (stretches_) {
            entries_[0] = entry_of(first_left(0) + lane_, middle_);
            entries_[1] = entry_of(first_left(1) + lane_, end_);
            return;
        }
        const uint32_t* from = dev::keep(a_.weight.outlier + (begin_ + lane_));
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (begin_ + lane_ + 32 * k < end_) entries_[k] = dev::load_stream(from + 32 * k);
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
    static constexpr int kAhead = 6;  // entries that a lane fetches early

    template <int TOKENS, int NT>
    HF_DEVICE void finish_tokens(const float (&total)[NT][4], float factor, int first_column, bool last,
                                 const ResidentX& x) {
        constexpr int kPadded = ResidentMap::padded(TOKENS), kBufferBytes = kSlices * kRows * kPadded * 4;
        if (2 * (lane_ & 3) < kPadded) {
            const uint32_t mine = put_at_ + buffer_;
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                const float (&of)[4] = total[j];
                dev::store_shared(mine + 32 * j, make_uint2(dev::as_bits(of[0]), dev::as_bits(of[1])));
                dev::store_shared(mine + kPadded * 4 + 32 * j, make_uint2(dev::as_bits(of[2]), dev::as_bits(of[3])));
            }
        }
        float outliers = 0.f;
        if (a_.weight.outlier) {
            float v[2 * TOKENS] = {};
            if (stretches_) {
                of_row<TOKENS, 0>(v, first_column, middle_, x);
                of_row<TOKENS, 1>(v, first_column, end_, x);
            } else {
                of_both_rows<TOKENS>(v, x);
            }
            outliers = sum_each(v, lane_);
        }
        dev::sync_group(1 + group_, kGroupThreads);

        // Lanes 16 * row + kPerToken * token + [0, kPerToken): as many as there are slices, or each takes some of
        // them.
        constexpr int kPerToken = 16 / TOKENS, kSummers = kPerToken < kSlices ? kPerToken : kSlices;
        const int i = lane_ >> 4, token = (lane_ & 15) / kPerToken;
        float y = sum_slices<kSummers * kRows * kPadded * 4, kSlices / kSummers>(get_at_ + buffer_);
#pragma unroll
        for (int mask = 1; mask < kSummers; mask *= 2) y = dev::add(y, dev::shuffle_xor(y, mask));
        buffer_ = kBufferBytes - buffer_;
        const int64_t row = row_ + i;
        if (lane_ % kPerToken != 0 || token >= a_.tokens || row >= a_.weight.rows) return;
        // In this order: what the factors come to may be far beyond fp32, or far below it, before the last one.
        const float scale = x.scale(token);
        y = dev::fma(dev::mul(y, scale), factor, dev::mul(outliers, scale));
        if (stretches_) {
            float& waiting = waiting_[(place_ + i) * kPadded + token];
            if (!fresh_) y = dev::add(waiting, y);
            waiting = y;
            if (!last) return;
        }
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

    // v[I * TOKENS + b] += the lane's share of row I's outliers, for token b. All columns of x are here.
    template <int TOKENS>
    HF_DEVICE void of_both_rows(float (&v)[2 * TOKENS], const ResidentX& x) const {
        const int index = begin_ + lane_;
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (index + 32 * k < end_) multiply<TOKENS>(v, entries_[k], 0, index + 32 * k < middle_, x);
        }
        for (int i = index + 32 * kAhead; i < end_; i += 32) {
            multiply<TOKENS>(v, dev::load_stream(a_.weight.outlier + i), 0, i < middle_, x);
        }
    }

    // Of row I, whose outliers end at `end`: those up to the next stretch of columns, where the cursor then stands.
    template <int TOKENS, int I>
    HF_DEVICE void of_row(float (&v)[2 * TOKENS], int first_column, int end, const ResidentX& x) {
        const uint32_t end_column = uint32_t(first_column + a_.plan.chunk_columns);
        uint32_t entry = entries_[I];
        int at = first_left(I), here = 32;
        while (here == 32) {
            const bool in = at + lane_ < end && (entry & 0xffffu) < end_column;
            if (in) multiply<TOKENS>(v, entry, uint32_t(first_column), I == 0, x);
            here = dev::count(in);
            at += here;
            if (here == 32) entry = entry_of(at + lane_, end);
        }
        dev::sync_warp();
        if (lane_ == 0) cursors_[place_ + I] = at;
    }

    // The first outlier of row i that belongs to this stretch of columns or to a later one.
    HF_DEVICE int first_left(int i) const { return !fresh_ ? cursors_[place_ + i] : i ? middle_ : begin_; }
    HF_DEVICE uint32_t entry_of(int index, int end) const {
        return index < end ? dev::load_stream(a_.weight.outlier + index) : 0;
    }

    template <int TOKENS>
    HF_DEVICE void multiply(float (&v)[2 * TOKENS], uint32_t entry, uint32_t first_column, bool first_row,
                            const ResidentX& x) const {
        const uint32_t at = x.template column_at<TOKENS>((entry & 0xffffu) - first_column);
        multiply_token<TOKENS, 0>(v, dev::high_float(entry), first_row, at);
    }
    template <int TOKENS, int B>
    HF_DEVICE void multiply_token(float (&v)[2 * TOKENS], float value, bool first_row, uint32_t at) const {
        const float x = dev::low_float(dev::load_shared_half<B * kTokenBytes>(at));
        v[B] = first_row ? dev::fma(value, x, v[B]) : v[B];
        v[TOKENS + B] = first_row ? v[TOKENS + B] : dev::fma(value, x, v[TOKENS + B]);
        if constexpr (B + 1 < TOKENS) multiply_token<TOKENS, B + 1>(v, value, first_row, at);
    }

    const ResidentArgs& a_;
    int group_, slice_, lane_;
    uint32_t put_at_, get_at_, buffer_ = 0;  // where the lane leaves sums and where it finds those it adds up
    float* waiting_;
    int* cursors_;
    int row_, place_, bound_ = 0, begin_, middle_, end_;
    bool stretches_, fresh_;
    uint32_t entries_[kAhead];
};

}  // namespace hf_spqr
