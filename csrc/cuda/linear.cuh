// y = x W^T + bias for up to 16 tokens, straight from the packed weights; where resident.cuh cannot.
//
// A block takes WIDTH * R row blocks and 8 * NT tokens. Its warps are WIDTH x SLICES: warp = slice * WIDTH + which;
// each takes R row blocks, and of their columns every SLICES-th step of 256. The warps of a slice share the step's x
// in shared memory (fetched a step ahead), and each keeps the words of its next step in flight while it multiplies.
// Slices are added up in a fixed order at the end, with outliers, bias and rounding.
#pragma once
#include "cuda/fragment.cuh"
#include "cuda/integer.cuh"
#include "cuda/kernels.h"
#include "cuda/outliers.cuh"
#include "cuda/row_block.cuh"
#include "cuda/store.cuh"

namespace hf_spqr {

template <int NT, int R, int WIDTH, int SLICES>
struct LinearShape {
    static constexpr int kWarps = WIDTH * SLICES;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kTokens = 8 * NT;
    static constexpr int kRowBlocks = R * WIDTH;

    // Tokens that x has room for. A tile of tokens that is not full is read with repeated tokens, or as garbage whose
    // results nobody reads.
    static HF_CONSTANT int x_tokens(int tokens) { return NT > 1 ? kTokens : tokens; }
    static constexpr int x_bytes(int tokens) { return 2 * SLICES * x_tokens(tokens) * kTokenBytes; }
    static constexpr int shared_bytes(int tokens, int stat_words) {
        const int loop = x_bytes(tokens) + kWarps * stat_words * 4, sums = kWarps * R * kRows * kTokens * 4;
        return loop > sums ? loop : sums;
    }
};

constexpr uint32_t kOnes = half2_power(0);

// Fetches x for the warps of a slice, step by step: this warp every WIDTH-th token, each lane 8 columns of it.
template <int NT, int WIDTH, int SLICES>
class XFetcher {
  public:
    HF_DEVICE XFetcher(const LinearArgs& a, int tokens, int which, int first_step, int lane, uint32_t to) {
        from_ = dev::keep(a.x + which * a.x_stride + first_step * kStepColumns + 8 * lane);
        stride_ = int(a.x_stride);
        left_ = int(a.x_stride) - 8 * lane - first_step * kStepColumns;
        count_ = (tokens - which + WIDTH - 1) / WIDTH;
        to_ = dev::keep(to + which * kTokenBytes + x_place(8 * lane));
    }

    // The slice's next 256 columns, to `further` bytes behind where the last ones went.
    HF_DEVICE void fetch(uint32_t further) {
        to_ += further;
        fetch_tokens<0>(left_ > 0 ? 16 : 0);
        from_ = dev::keep(from_ + SLICES * kStepColumns);
        left_ -= SLICES * kStepColumns;
    }

  private:
    // Four tokens without a branch, then the next four, if there are any.
    template <int I>
    HF_DEVICE void fetch_tokens(int bytes) {
        dev::copy_async<I * WIDTH * kTokenBytes>(to_, dev::at_stride<I * WIDTH>(from_, stride_), bytes, I < count_);
        constexpr int next = I + 1;
        if constexpr (next < 8 * NT / WIDTH) {
            if (next % 4 == 0 && next >= count_) return;
            fetch_tokens<next>(bytes);
        }
    }

    const uint16_t* from_;
    int stride_, left_, count_;
    uint32_t to_;
};

// One set: acc += W x over its 128 columns. x as in multiply_quarter.
template <class Stats, int BITS, int NT, int H>
HF_DEVICE void multiply_set(float (&acc)[NT][4], RowBlock<Stats, BITS>& block, uint32_t x) {
    uint32_t w[2][BITS];
    block.words.template split<H>(w);
    Quarter q;
    block.stats.template load_set<H>();
    block.stats.template quarter<H, 0>(q);
    multiply_quarter<BITS, NT, 0, H>(acc, w, q, x);
    block.stats.template quarter<H, 1>(q);
    multiply_quarter<BITS, NT, 1, H>(acc, w, q, x);
    block.stats.template quarter<H, 2>(q);
    multiply_quarter<BITS, NT, 2, H>(acc, w, q, x);
    block.stats.template quarter<H, 3>(q);
    multiply_quarter<BITS, NT, 3, H>(acc, w, q, x);
}

// One step, 256 columns in two sets, and the words of the next one on their way.
template <class Stats, int BITS, int NT>
HF_DEVICE void multiply_step(float (&total)[1][NT][4], RowBlock<Stats, BITS> (&blocks)[1], int next, uint32_t x) {
    RowBlock<Stats, BITS>& block = blocks[0];
    float acc[NT][4] = {};
    multiply_set<Stats, BITS, NT, 0>(acc, block, x);
    block.words.template fetch<0>(next);
    multiply_set<Stats, BITS, NT, 1>(acc, block, x);
    block.words.template fetch<1>(next);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[0][j][e] = dev::fma(acc[j][e], block.stats.factor(e >> 1), total[0][j][e]);
    }
}

// Set H of a step with codes as integers (integer.cuh).
template <class Stats, int BITS, int NT, int R, int H>
HF_DEVICE void multiply_integer_set(float (&total)[R][NT][4], RowBlock<Stats, BITS> (&blocks)[R], int next, uint32_t x,
                                    const uint32_t (&ones)[4]) {
    IntegerSums<BITS, NT> sums[R];
    float x_sums[NT][4] = {};
    uint32_t w[R][2][BITS];
#pragma unroll
    for (int r = 0; r < R; ++r) blocks[r].words.template split<H>(w[r]);
    multiply_codes<BITS, NT, R, 0, H>(sums, x_sums, w, ones, x);
    multiply_codes<BITS, NT, R, 1, H>(sums, x_sums, w, ones, x);
    multiply_codes<BITS, NT, R, 2, H>(sums, x_sums, w, ones, x);
    multiply_codes<BITS, NT, R, 3, H>(sums, x_sums, w, ones, x);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        add_set<BITS, NT>(total[r], sums[r], x_sums, blocks[r].stats.template set<H>());
        blocks[r].words.template fetch<H>(next);
    }
}

// Adds up the slices, adds outliers and bias, scales and writes. One warp per row.
template <int NT, int R, int WIDTH, int SLICES>
HF_DEVICE void finish_rows(const LinearArgs& a, const float (&total)[R][NT][4], float factor, float* sums) {
    using Shape = LinearShape<NT, R, WIDTH, SLICES>;
    constexpr int kBlockRows = Shape::kRowBlocks * kRows;
    const int lane = dev::thread() & 31, warp = dev::thread() >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < R; ++i) {
        float* mine = sums + ((warp * R + i) * kRows + 2 * g) * Shape::kTokens + 2 * t;  // [slice][row][token]
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            mine[8 * j] = total[i][j][0];
            mine[8 * j + 1] = total[i][j][1];
            mine[Shape::kTokens + 8 * j] = total[i][j][2];
            mine[Shape::kTokens + 8 * j + 1] = total[i][j][3];
        }
    }
    dev::sync_block();
    constexpr int kLanes = Shape::kTokens / kLaneTokens;
    const int first = lane % kLanes * kLaneTokens;
    for (int r = warp; r < kBlockRows; r += Shape::kWarps) {
        const int64_t row = dev::block_x() * kBlockRows + r;
        if (row >= a.weight.rows) break;
        float v[kLaneTokens] = {};
        if (a.weight.outlier) multiply_outliers<Shape::kTokens>(v, a, int(row), lane);
        if (lane >= kLanes) continue;
        const float bias = a.bias ? read_as(a.bias, row, a.dtype) : 0.f;
        for (int b = 0; b < kLaneTokens && first + b < a.tokens; ++b) {
            const float* slices = sums + r * Shape::kTokens + lane * kLaneTokens + b;
            float y = slices[0];
#pragma unroll
            for (int s = 1; s < SLICES; ++s) y = dev::add(y, slices[s * kBlockRows * Shape::kTokens]);
            // In this order: what the factors come to may be far beyond fp32, or far below it, before the last one.
            const float scale = a.token_scale ? a.token_scale[first + b] : 1.f;
            y = dev::fma(dev::mul(y, scale), factor, dev::mul(v[b], scale));
            write_as(a.y, int64_t(first + b) * a.weight.rows + row, a.dtype, dev::add(y, bias));
        }
    }
}

template <class Stats, int BITS, int NT, int R, int WIDTH, int SLICES, int BLOCKS_PER_SM>
HF_KERNEL(32 * WIDTH * SLICES, BLOCKS_PER_SM)
linear_kernel(const LinearArgs a) {
    using Shape = LinearShape<NT, R, WIDTH, SLICES>;
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), g = lane >> 2, t = lane & 3;
    const int slice = warp / WIDTH, which = warp % WIDTH;
    const int tokens = a.tokens;  // at most Shape::kTokens
    const int steps = int(dev::keep(uint32_t(m.panels.tiles + kStepTiles - 1) / kStepTiles));

    // Shared memory: two buffers of x for each slice, statistics for each warp.
    const uint32_t shared = dev::shared_address(), buffer_bytes = Shape::x_tokens(tokens) * kTokenBytes;
    const uint32_t x_slice = shared + 2 * slice * buffer_bytes;
    RowBlocks<Stats, BITS, R> mine(
        std::make_integer_sequence<int, R>{}, m, (dev::block_x() * WIDTH + which) * R, lane, slice, SLICES,
        shared + 2 * SLICES * buffer_bytes + warp * (R * Stats::kSharedWords * 4), Stats::kSharedWords * 4);
    XFetcher<NT, WIDTH, SLICES> x(a, tokens, which, slice, lane, x_slice);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        if (slice < steps) mine.each[r].fetch(slice);
    }
    x.fetch(0);

    // The lane's token g (or the last one) and tile t.
    const int token = NT > 1 ? g : (g < tokens ? g : tokens - 1);
    uint32_t x_at = x_slice + token * kTokenBytes + x_place(kColumns * t);
    // A matrix of ones, as four numbers that the compiler cannot tell to be the same: so it keeps them in the four
    // registers that an mma wants, and does not fill those again for each.
    const uint32_t none = uint32_t(a.tokens) >> 28;
    const uint32_t ones[4] = {kOnes + none, kOnes + (none >> 1), kOnes + (none >> 2), kOnes + (none >> 3)};
    uint32_t other = dev::keep(buffer_bytes);  // from the buffer in use to the other one
    float total[R][NT][4] = {};
    // Where warps share x, all go through the loop equally often, because they meet in it.
    const int end = WIDTH > 1 ? (steps + SLICES - 1) / SLICES * SLICES : steps;
    for (int step = slice; step < end; step += SLICES) {
        dev::wait_for_copies();
        if constexpr (WIDTH > 1) {
            dev::sync_block();
        } else {
            dev::sync_warp();
        }
        const int next = step + SLICES;
        if (next < steps) x.fetch(other);
        if (WIDTH == 1 || step < steps) {
#pragma unroll
            for (int r = 0; r < R; ++r) mine.each[r].stats.decode(step);
            if (next < steps) {
#pragma unroll
                for (int r = 0; r < R; ++r) mine.each[r].stats.prefetch(next);
            }
            if constexpr (Stats::kInteger) {
                multiply_integer_set<Stats, BITS, NT, R, 0>(total, mine.each, next, x_at, ones);
                multiply_integer_set<Stats, BITS, NT, R, 1>(total, mine.each, next, x_at, ones);
            } else {
                dev::sync_warp();
                multiply_step<Stats, BITS, NT>(total, mine.each, next, x_at);
            }
        }
        x_at += other;
        other = 0 - other;
    }
    dev::wait_for_copies();  // of zeros, by warps whose slice has no step
    dev::sync_block();
    finish_rows<NT, R, WIDTH, SLICES>(a, total, Stats::kFactor, reinterpret_cast<float*>(dev::shared_memory()));
}

}  // namespace hf_spqr
