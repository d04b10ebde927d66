// y = x W^T + bias for up to 16 tokens, straight from the packed weights, with x in shared memory.
//
// One block for each multiprocessor. Its warps are groups of kSlices; a group takes one row block after the other, and
// of a row block's columns each warp takes every kSlices-th step of 256. What a warp needs of the packed matrix it
// fetches itself, in order, through a ring of slots in shared memory, some steps ahead and on across row blocks, so
// that memory is never idle. x is converted once, when it is put into shared memory; if it does not fit, a stretch of
// columns at a time, and the sums of up to kBatch row blocks wait for the next stretch. Slices are added up in a fixed
// order, with outliers, bias and rounding.
#pragma once
#include "cuda/fragment.cuh"
#include "cuda/integer.cuh"
#include "cuda/resident_plan.h"
#include "cuda/resident_sums.cuh"
#include "cuda/resident_x.cuh"

namespace hf_spqr {

// A warp's steps of a stretch of columns, row block after row block; the same for fetching and for multiplying.
class Walk {
  public:
    // Steps `first`, first + kSlices, ... before `end`, of `row_blocks` row blocks that lie `between` words apart.
    HF_DEVICE Walk(const uint32_t* stream, int64_t between, int row_blocks, int first, int end)
        : stream_(stream), between_(between), first_(first), end_(end), step_(first) {
        left_ = first < end ? ((end - first - 1) / kSlices + 1) * row_blocks : 0;
    }

    HF_DEVICE bool ended() const { return left_ <= 0; }
    HF_DEVICE int step() const { return step_; }
    HF_DEVICE const uint32_t* stream() const { return stream_; }
    HF_DEVICE void next() {
        --left_;
        step_ += kSlices;
        if (step_ < end_) return;
        step_ = first_;
        stream_ += between_;
    }

  private:
    const uint32_t* stream_;
    int64_t between_;
    int first_, end_, step_, left_;
};

// A warp's ring of slots. A slot holds a step: eight tiles, each with room after it so that the four of a set meet in
// different banks, then the statistics.
template <class Stats, int BITS>
class Ring {
  public:
    static constexpr int kTileBytes = tile_bytes(BITS);
    static constexpr int kSlotBytes = kStepTiles * kTileBytes + Stats::kRingBytes;

    HF_DEVICE Ring(const Matrix& m, const Walk& first, uint32_t at, int lane)
        : m_(m), ahead_(first), begin_(at), last_(dev::pin(at + (kStages - 1) * kSlotBytes)), slot_(last_) {
        lane_words_ = int(dev::pin(uint32_t(4 * lane)));
        to_ = dev::pin((lane >> 2) * kTileBytes + (lane & 3) * 16);
        from_ = dev::pin((lane >> 2) * (BITS * kRows) + (lane & 3) * 4);
        lane_steps_ = int(dev::pin(uint32_t(m.panels.tiles + kStepTiles - 1 - (lane >> 2)) / kStepTiles));
    }

    // Towards the L2 cache: what will be fetched first.
    HF_DEVICE void prefetch(int lane) const {
        Walk soon = ahead_;
        for (int i = 0; i < kStages - 1 && !soon.ended(); ++i) {
            const int at = int(Place(m_.panels, soon.step()).tiles()) - Stats::kRingBytes / 4 + 32 * lane;
            const bool wanted = 32 * lane < kStepTiles * BITS * kRows + Stats::kRingBytes / 4;
            if (wanted && at < m_.panels.words) dev::prefetch(soon.stream() + at);
            soon.next();
        }
    }

    // To the beginning of a walk, when nothing of the last one is left.
    HF_DEVICE void start(const Walk& walk) {
        ahead_ = walk;
        slot_ = last_;
        dev::sync_warp();
        for (int i = 0; i < kStages - 1; ++i) fetch(begin_ + i * kSlotBytes);
    }

    // The slot of the next step, when it is there for the whole warp; then the slot of the step before, which nobody
    // needs any more, is filled with another one.
    HF_DEVICE uint32_t next() {
        dev::wait_for_copies_but<kStages - 2>();
        dev::sync_warp();
        const uint32_t before = slot_;
        slot_ = slot_ == last_ ? begin_ : slot_ + kSlotBytes;
        fetch(before);
        return slot_;
    }

  private:
    // A step of a row block: its panel, its place in there, the panel's beginning and statistics in words.
    struct Place {
        int in_panel, stat_words;
        uint32_t panel;

        HF_DEVICE Place(const Panels& p, int step) {
            constexpr int shift = Stats::kTileShift - 3;  // log2 of a panel's steps
            in_panel = int(dev::keep(uint32_t(step & ((1 << shift) - 1))));
            stat_words = step >> shift == p.last_panel ? p.last_stat_words : p.stat_words;
            panel = uint32_t((step >> shift) * p.panel_words);
        }
        HF_DEVICE uint32_t tiles() const {
            return panel + uint32_t(stat_words + in_panel * (kStepTiles * BITS * kRows));
        }
    };

    // Fetches the next step of all into a slot.
    HF_DEVICE void fetch(uint32_t slot) {
        if (!ahead_.ended()) {
            const Place place(m_.panels, ahead_.step());
            Stats::template fetch<kStepTiles * kTileBytes>(m_, ahead_.stream(), place.panel, place.stat_words,
                                                           place.in_panel, slot, lane_words_);
            copy<0>(slot + to_, ahead_.stream() + (place.tiles() + from_), ahead_.step() < lane_steps_);
            ahead_.next();
        }
        dev::close_copies();
    }

    template <int V>
    static HF_DEVICE void copy(uint32_t to, const uint32_t* from, bool valid) {
        dev::copy_stream<V * kRows * 4, V * kRows * 4>(to, from, valid);
        if constexpr (V + 1 < BITS) copy<V + 1>(to, from, valid);
    }

    const Matrix& m_;
    Walk ahead_;
    uint32_t begin_, last_, slot_, to_, from_;
    int lane_words_, lane_steps_;  // steps that have the lane's tile
};

// The words of set H of a slot, row by row. `at` is the slot and the lane's place in it.
template <int BITS, int H, int V = 0>
HF_DEVICE void load_words(uint32_t (&w)[2][BITS], uint32_t at) {
    const uint2 both = dev::load_shared2<H * kTilesPerSet * tile_bytes(BITS) + V * kRows * 4>(at);
    w[0][V] = both.x;
    w[1][V] = both.y;
    if constexpr (V + 1 < BITS) load_words<BITS, H, V + 1>(w, at);
}

// Quarter I of set H of a step: acc += W x over its columns, every second mma into acc[1], which need not wait for the
// other. x[j] as in multiply_quarter, for the j-th eight tokens.
template <class Stats, int BITS, int NT, int H, int I>
HF_DEVICE void multiply_resident_quarter(float (&acc)[2][NT][4], Stats& stats, const uint32_t (&w)[2][BITS],
                                         const uint32_t (&x)[NT]) {
    Quarter q;
    if constexpr (I == 0) stats.template load_set<H>();
    stats.template quarter<H, I>(q);
    uint32_t first[4], second[4];
    weight_operand<BITS, 4 * I>(first, w, q);
    weight_operand<BITS, 4 * I + 2>(second, w, q);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        const uint4 b = load_x<I, H, 0>(x[j]);
        dev::mma_f16(acc[0][j], first, b.x, b.y);
        dev::mma_f16(acc[1][j], second, b.z, b.w);
    }
}

// A step of two sets.
template <class Stats, int BITS, int NT>
HF_DEVICE void multiply_resident_step(float (&total)[NT][4], Stats& stats, uint32_t words, const uint32_t (&x)[NT]) {
    float acc[2][NT][4] = {};
    uint32_t w[2][BITS], v[2][BITS];
    load_words<BITS, 0>(w, words);
    multiply_resident_quarter<Stats, BITS, NT, 0, 0>(acc, stats, w, x);
    multiply_resident_quarter<Stats, BITS, NT, 0, 1>(acc, stats, w, x);
    load_words<BITS, 1>(v, words);
    multiply_resident_quarter<Stats, BITS, NT, 0, 2>(acc, stats, w, x);
    multiply_resident_quarter<Stats, BITS, NT, 0, 3>(acc, stats, w, x);
    multiply_resident_quarter<Stats, BITS, NT, 1, 0>(acc, stats, v, x);
    multiply_resident_quarter<Stats, BITS, NT, 1, 1>(acc, stats, v, x);
    multiply_resident_quarter<Stats, BITS, NT, 1, 2>(acc, stats, v, x);
    multiply_resident_quarter<Stats, BITS, NT, 1, 3>(acc, stats, v, x);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            total[j][e] = dev::fma(dev::add(acc[0][j][e], acc[1][j][e]), stats.factor(e >> 1), total[j][e]);
        }
    }
}

// Set H of a step with codes as integers (integer.cuh). x_sums[j]: the step's sums of x for the lane's two of the j-th
// eight tokens, over set 0, then over set 1.
template <class Stats, int BITS, int NT, int H>
HF_DEVICE void multiply_integer_set(float (&total)[NT][4], Stats& stats, uint32_t words, const uint32_t (&x)[NT],
                                    const uint4 (&x_sums)[NT]) {
    uint32_t w[2][BITS];
    load_words<BITS, H>(w, words);
    IntegerSums<BITS, NT> sums;
    multiply_integers<BITS, NT, 0, H>(sums, w, x);
    multiply_integers<BITS, NT, 1, H>(sums, w, x);
    multiply_integers<BITS, NT, 2, H>(sums, w, x);
    multiply_integers<BITS, NT, 3, H>(sums, w, x);
    float of_x[NT][4];
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        of_x[j][0] = of_x[j][2] = dev::as_float(H ? x_sums[j].z : x_sums[j].x);
        of_x[j][1] = of_x[j][3] = dev::as_float(H ? x_sums[j].w : x_sums[j].y);
    }
    add_set<BITS, NT>(total, sums, of_x, stats.template set<H>());
}

template <class Stats, int BITS, int NT>
HF_KERNEL(most_groups(NT) * kGroupThreads, 1)
linear_resident_kernel(const ResidentArgs a) {
    dev::let_next_kernel_start();
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), g = lane >> 2, t = lane & 3;
    const int group = warp / kSlices, slice = warp % kSlices, groups = dev::block_threads() / kGroupThreads;
    const ResidentMap map(a.plan, m.columns, a.tokens, groups, Ring<Stats, BITS>::kSlotBytes, Stats::kSharedWords * 4,
                          Stats::kInteger);
    const uint32_t shared = dev::shared_address();

    const int blocks = dev::grid_blocks(), row_blocks = (m.rows - 1) / kRows + 1, stride = blocks * groups;
    const int first = int(dev::block_x()) + blocks * group, rounds = (row_blocks + stride - 1) / stride;
    const int mine = first < row_blocks ? (row_blocks - 1 - first) / stride + 1 : 0;
    const int steps = (m.panels.tiles + kStepTiles - 1) / kStepTiles,
              chunk_steps = a.plan.chunk_columns / kStepColumns;
    const bool stretches = steps > chunk_steps;
    const auto walk = [&](int batch, int chunk) {
        const int end = chunk + chunk_steps < steps ? chunk + chunk_steps : steps;
        const int here = stretches && mine - batch > kBatch ? kBatch : mine - batch;
        return Walk(m.packed + (first + int64_t(batch) * stride) * m.panels.words, int64_t(stride) * m.panels.words,
                    here, chunk + slice, end);
    };
    Ring<Stats, BITS> ring(m, walk(0, 0), shared + map.rings + warp * map.ring_bytes, lane);
    // What the kernel before this one in the stream wrote may be read only when it has ended.
    ring.prefetch(lane);
    dev::wait_for_kernel();
    Stats stats(m, m.packed, lane, 0, 0, shared + map.scratch + warp * (Stats::kSharedWords * 4));
    GroupSums sums(a, shared, map, group, slice, lane);
    ResidentX x(a, shared, map);

    const uint32_t x_advance = dev::pin(kSlices * a.tokens * kTokenBytes);
    const uint32_t words_at = dev::pin(t * Ring<Stats, BITS>::kTileBytes + 8 * g);
    constexpr int kStats = kStepTiles * Ring<Stats, BITS>::kTileBytes;  // where a slot has statistics
    for (int batch = 0; batch < rounds; batch += kBatch) {
        sums.begin_batch(first + batch * stride, stride);
        for (int chunk = 0; chunk < steps; chunk += chunk_steps) {
            if (batch + chunk == 0 || stretches) {
                ring.start(walk(batch, chunk));
                if (batch + chunk == 0) x.find_scales();
                x.load<4 * NT>(chunk * kStepColumns);
            }
            const int end = chunk + chunk_steps < steps ? chunk + chunk_steps : steps;
            for (int round = batch; round < batch + kBatch && round < mine; ++round) {
                const int row_block = first + round * stride;
                sums.begin(row_block, round - batch, chunk == 0);
                stats.begin(m.packed + int64_t(row_block) * m.panels.words);
                uint32_t x_at[NT], x_sums[NT];
#pragma unroll
                for (int j = 0; j < NT; ++j) {
                    // Tokens that do not exist are read as others.
                    const int token = 8 * j + g < a.tokens ? 8 * j + g : j > 0 ? g : a.tokens - 1;
                    x_sums[j] = x.sums_at(slice, 8 * j + 2 * t < a.tokens ? 4 * j + t : 0);
                    x_at[j] = shared + (slice * a.tokens + token) * kTokenBytes + x_place(kColumns * t);
                }
                float total[NT][4] = {};
                for (int step = chunk + slice; step < end; step += kSlices) {
                    const uint32_t slot = ring.next();
                    stats.take(slot + kStats, step);
                    if constexpr (Stats::kInteger) {
                        uint4 of_x[NT];
#pragma unroll
                        for (int j = 0; j < NT; ++j) {
                            of_x[j] = dev::load_shared4<0>(x_sums[j]);
                            x_sums[j] += kSlices * x.bytes_of_step_sums();
                        }
                        multiply_integer_set<Stats, BITS, NT, 0>(total, stats, slot + words_at, x_at, of_x);
                        multiply_integer_set<Stats, BITS, NT, 1>(total, stats, slot + words_at, x_at, of_x);
                    } else {
                        stats.decode(step);
                        dev::sync_warp();
                        multiply_resident_step<Stats, BITS, NT>(total, stats, slot + words_at, x_at);
                    }
#pragma unroll
                    for (int j = 0; j < NT; ++j) x_at[j] += x_advance;
                }
                sums.finish(total, Stats::kFactor, chunk * kStepColumns, end == steps, x);
            }
        }
    }
}

}  // namespace hf_spqr
