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

// The order in which a warp goes through its steps; the same for fetching and for multiplying.
class Walk {
  public:
    HF_DEVICE Walk(const ResidentArgs& a, int first, int stride, int slice)
        : steps_(a.weight.panels.tiles), chunk_steps_(a.plan.chunk_columns / kStepColumns), slice_(slice) {
        steps_ = (steps_ + kStepTiles - 1) / kStepTiles;
        const int row_blocks = (a.weight.rows - 1) / kRows + 1;
        words_ = a.weight.panels.words;
        rounds_ = first < row_blocks ? (row_blocks - 1 - first) / stride + 1 : 0;
        stream_ = a.weight.packed + int64_t(first) * words_;
        between_ = int64_t(stride) * words_;
        batch_end_ = rounds_ < kBatch ? rounds_ : kBatch;
        begin_chunk(0);
        if (rounds_ > 0) settle();
    }

    HF_DEVICE bool ended() const { return batch_ >= rounds_; }
    HF_DEVICE int step() const { return step_; }
    HF_DEVICE const uint32_t* stream() const { return stream_; }
    HF_DEVICE void next() {
        step_ += kSlices;
        settle();
    }

  private:
    HF_DEVICE void begin_chunk(int from) {
        chunk_ = from;
        chunk_end_ = from + chunk_steps_ < steps_ ? from + chunk_steps_ : steps_;
        step_ = from + slice_;
        round_ = batch_;
    }

    // On to a step that there is.
    HF_DEVICE void settle() {
        while (step_ >= chunk_end_) {
            if (round_ + 1 < batch_end_) {  // the next row block
                ++round_;
                stream_ += between_;
                step_ = chunk_ + slice_;
                continue;
            }
            if (chunk_end_ < steps_) {  // the next columns of the same row blocks
                stream_ -= (round_ - batch_) * between_;
                begin_chunk(chunk_end_);
                continue;
            }
            stream_ += between_;
            batch_ = batch_end_;
            batch_end_ = rounds_ < batch_ + kBatch ? rounds_ : batch_ + kBatch;
            if (ended()) return;
            begin_chunk(0);
        }
    }

    int steps_, chunk_steps_, slice_, words_, rounds_;
    const uint32_t* stream_;
    int64_t between_;
    int batch_ = 0, batch_end_, chunk_, chunk_end_, round_, step_;
};

// A warp's ring of slots. A slot holds a step: eight tiles, each with room after it so that the four of a set meet in
// different banks, then the statistics.
template <class Stats, int BITS>
class Ring {
  public:
    static constexpr int kTileBytes = tile_bytes(BITS);
    static constexpr int kSlotBytes = kStepTiles * kTileBytes + Stats::kRingBytes;

    HF_DEVICE Ring(const ResidentArgs& a, const Walk& first, uint32_t at, int lane)
        : m_(a.weight), ahead_(first), begin_(at), last_(at + (kStages - 1) * kSlotBytes), slot_(last_) {
        lane_words_ = int(dev::pin(uint32_t(4 * lane)));
        to_ = dev::pin((lane >> 2) * kTileBytes + (lane & 3) * 16);
        from_ = dev::pin((lane >> 2) * (BITS * kRows) + (lane & 3) * 4);
        // What the kernel before this one in the stream wrote may be read only when it has ended. Until then, towards
        // the L2 cache.
        Walk soon = first;
        for (int i = 0; i < 2 && !soon.ended(); ++i) {
            const uint32_t* words = soon.stream() + tiles_of(soon.step()) - Stats::kRingBytes / 4;
            if (32 * lane < kStepTiles * BITS * kRows + Stats::kRingBytes / 4) dev::prefetch(words + 32 * lane);
            soon.next();
        }
        dev::wait_for_kernel();
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
    // Where in a row block the tiles of a step lie.
    HF_DEVICE uint32_t tiles_of(int step) const {
        const Panels& p = m_.panels;
        constexpr int tile_shift = Stats::kTileShift;
        const int tile = step * kStepTiles, panel = tile >> tile_shift;
        const int stat_words = panel == p.last_panel ? p.last_stat_words : p.stat_words;
        return uint32_t(panel * p.panel_words + stat_words) + uint32_t(tile - (panel << tile_shift)) * (BITS * kRows);
    }

    // Fetches the next step of all into a slot.
    HF_DEVICE void fetch(uint32_t slot) {
        if (!ahead_.ended()) {
            const Panels& p = m_.panels;
            const int step = ahead_.step(), tile = step * kStepTiles, panel = tile >> Stats::kTileShift;
            const int stat_words = panel == p.last_panel ? p.last_stat_words : p.stat_words;
            Stats::fetch(m_, ahead_.stream(), uint32_t(panel * p.panel_words), stat_words, step,
                         slot + kStepTiles * kTileBytes, lane_words_);
            copy<0>(slot + to_, ahead_.stream() + (tiles_of(step) + from_), tile * 16 + lane_words_ < p.tiles * 16);
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
    int lane_words_;
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
// other. x[j][i] is chunk i of the lane's tile of set 0, of token g of the j-th eight.
template <class Stats, int BITS, int NT, int H, int I>
HF_DEVICE void multiply_resident_quarter(float (&acc)[2][NT][4], Stats& stats, const uint32_t (&w)[2][BITS],
                                         const uint32_t (&x)[NT][4]) {
    Quarter q;
    stats.template quarter<H, I>(q);
    uint32_t first[4], second[4];
    weight_operand<BITS, 4 * I>(first, w, q);
    weight_operand<BITS, 4 * I + 2>(second, w, q);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        const uint4 b = dev::load_shared4<H * 256>(x[j][I]);
        dev::mma_f16(acc[0][j], first, b.x, b.y);
        dev::mma_f16(acc[1][j], second, b.z, b.w);
    }
}

// A step of two sets.
template <class Stats, int BITS, int NT>
HF_DEVICE void multiply_resident_step(float (&total)[NT][4], Stats& stats, uint32_t words,
                                      const uint32_t (&x)[NT][4]) {
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
    const float factor = stats.factor();
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            total[j][e] = dev::fma(dev::add(acc[0][j][e], acc[1][j][e]), factor, total[j][e]);
        }
    }
}

// Set H of a step with codes as integers (integer.cuh); the sums of x over the set are at x_sums[j] for the j-th eight
// tokens.
template <class Stats, int BITS, int NT, int H>
HF_DEVICE void multiply_integer_set(float (&total)[NT][4], Stats& stats, uint32_t words, const uint32_t (&x)[NT][4],
                                    const uint32_t (&x_sums)[NT], uint32_t sums_offset) {
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
        const uint2 both = dev::load_shared2<0>(x_sums[j] + sums_offset);
        of_x[j][0] = of_x[j][2] = dev::as_float(both.x);
        of_x[j][1] = of_x[j][3] = dev::as_float(both.y);
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
    const int first = int(dev::block_x()) + blocks * group;
    Ring<Stats, BITS> ring(a, Walk(a, first, stride, slice), shared + map.rings + warp * map.ring_bytes, lane);
    Stats stats(m, m.packed, lane, 0, 0, shared + map.scratch + warp * (Stats::kSharedWords * 4));
    GroupSums sums(a, shared, map, group, slice, lane);
    ResidentX x(a, shared, map);

    const int steps = (m.panels.tiles + kStepTiles - 1) / kStepTiles,
              chunk_steps = a.plan.chunk_columns / kStepColumns;
    const int rounds = (row_blocks + stride - 1) / stride;
    const uint32_t x_advance = kSlices * a.tokens * kTokenBytes;
    const uint32_t words_at = dev::pin(t * Ring<Stats, BITS>::kTileBytes + 8 * g);
    constexpr int kStats = kStepTiles * Ring<Stats, BITS>::kTileBytes;  // where a slot has statistics
    for (int batch = 0; batch < rounds; batch += kBatch) {
        for (int chunk = 0; chunk < steps; chunk += chunk_steps) {
            if (batch + chunk == 0 || steps > chunk_steps) x.load<4 * NT>(chunk * kStepColumns);
            const int end = chunk + chunk_steps < steps ? chunk + chunk_steps : steps;
            for (int round = batch; round < batch + kBatch; ++round) {
                const int row_block = first + round * stride;
                if (row_block >= row_blocks) break;
                sums.begin(row_block, round - batch, chunk == 0);
                stats.begin(m.packed + int64_t(row_block) * m.panels.words);
                uint32_t x_at[NT][4], x_sums[NT];
#pragma unroll
                for (int j = 0; j < NT; ++j) {
                    // Tokens that do not exist are read as others.
                    const int token = 8 * j + g < a.tokens ? 8 * j + g : j > 0 ? g : a.tokens - 1;
                    x_sums[j] = x.sums_at(slice, 8 * j + 2 * t < a.tokens ? 4 * j + t : 0);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        x_at[j][i] =
                            shared + (slice * a.tokens + token) * kTokenBytes + 16 * x_place(4 * t + i, token);
                    }
                }
                float total[NT][4] = {};
                for (int step = chunk + slice; step < end; step += kSlices) {
                    const uint32_t slot = ring.next();
                    stats.take(slot + kStats, step);
                    if constexpr (Stats::kInteger) {
                        multiply_integer_set<Stats, BITS, NT, 0>(total, stats, slot + words_at, x_at, x_sums, 0);
                        multiply_integer_set<Stats, BITS, NT, 1>(total, stats, slot + words_at, x_at, x_sums,
                                                                 x.bytes_of_set_sums());
#pragma unroll
                        for (int j = 0; j < NT; ++j) x_sums[j] += 2 * kSlices * x.bytes_of_set_sums();
                    } else {
                        if (step + kSlices >= end) sums.fetch_outliers();
                        stats.decode(step);
                        dev::sync_warp();
                        multiply_resident_step<Stats, BITS, NT>(total, stats, slot + words_at, x_at);
                    }
#pragma unroll
                    for (int j = 0; j < NT; ++j) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) x_at[j][i] += x_advance;
                    }
                }
                sums.finish(total, Stats::kFactor, chunk * kStepColumns, end == steps, x);
            }
        }
    }
}

}  // namespace hf_spqr
