// y = x W^T + bias for few tokens, straight from the packed weights.
//
// A block takes ROW_BLOCKS row blocks and 8 * NT tokens. Its warps are ROW_BLOCKS x SLICES: warp = slice * ROW_BLOCKS +
// row block; a slice takes every SLICES-th step of 256 columns. The warps of a slice share the step's x in shared memory
// (fetched a step ahead), and each keeps the words of its next step in flight while it multiplies. Slices are added up in
// a fixed order at the end, with outliers, bias and rounding.
#pragma once
#include "cuda/fragment.cuh"
#include "cuda/kernels.h"
#include "cuda/outliers.cuh"
#include "cuda/store.cuh"

namespace hf_spqr {

template <int NT, int ROW_BLOCKS, int SLICES>
struct LinearShape {
    static constexpr int kWarps = ROW_BLOCKS * SLICES;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kTokens = 8 * NT;

    // Tokens that x has room for. A tile of tokens that is not full is read with repeated tokens, or as garbage whose
    // results nobody reads.
    static HF_CONSTANT int x_tokens(int tokens) { return NT > 1 ? kTokens : tokens; }
    static constexpr int x_bytes(int tokens) { return 2 * SLICES * (NT > 1 ? kTokens : tokens) * kStepColumns * 2; }
    static constexpr int shared_bytes(int tokens, int stat_words) {
        const int loop = x_bytes(tokens) + kWarps * stat_words * 4, sums = kWarps * kRows * kTokens * 4;
        return loop > sums ? loop : sums;
    }
};

// A slice's x: per token 32 chunks of 8 columns, permuted so that neither writing a row nor reading four tiles collides.
// Chunk c of token b lies at chunk x_place(c, b) of its row.
HF_DEVICE int x_place(int chunk, int token) {
    return chunk ^ (chunk >> 3 & 1) ^ (token & 1) << 1;
}

constexpr int kTokenBytes = kStepColumns * 2;

// Fetches x for the warps of a slice, step by step: this warp every ROW_BLOCKS-th token, each lane 8 columns of it.
template <int NT, int ROW_BLOCKS, int SLICES>
class XFetcher {
  public:
    HF_DEVICE XFetcher(const LinearArgs& a, int64_t first_token, int tokens, int which, int first_step, int lane,
                       uint32_t to) {
        from_ = dev::keep(a.x + (first_token + which) * a.x_stride + first_step * kStepColumns + 8 * lane);
        more_ = ROW_BLOCKS * a.x_stride;
        left_ = int(a.x_stride) - 8 * lane - first_step * kStepColumns;
        count_ = (tokens - which + ROW_BLOCKS - 1) / ROW_BLOCKS;
        to_ = dev::keep(to + which * kTokenBytes + 16 * x_place(lane, which));
    }

    // The slice's next 256 columns to the buffer at byte `buffer`.
    HF_DEVICE void fetch(uint32_t buffer) {
        const uint32_t even = to_ + buffer, odd = ROW_BLOCKS > 1 ? even : even ^ 32;
        fetch_tokens<0>(from_, even, odd, left_ > 0 ? 16 : 0);
        from_ = dev::keep(from_ + SLICES * kStepColumns);
        left_ -= SLICES * kStepColumns;
    }

  private:
    // Four tokens without a branch, then the next four, if there are any.
    template <int I>
    HF_DEVICE void fetch_tokens(const uint16_t* from, uint32_t even, uint32_t odd, int bytes) {
        dev::copy_async<I * ROW_BLOCKS * kTokenBytes>(I & 1 ? odd : even, from, bytes, I < count_);
        constexpr int next = I + 1;
        if constexpr (next < 8 * NT / ROW_BLOCKS) {
            if (next % 4 == 0 && next >= count_) return;
            fetch_tokens<next>(from + more_, even, odd, bytes);
        }
    }

    const uint16_t* from_;
    int64_t more_;
    int left_, count_;
    uint32_t to_;
};

// Words of the two sets of a step, two rows at a time. Past the last tile the old words stay: their x is zero.
template <class Stats, int BITS>
class WordFetcher {
  public:
    uint2 words[2][BITS] = {};

    HF_DEVICE WordFetcher(const Matrix& m, const uint32_t* stream, int lane) : m_(m) {
        from_ = dev::keep(stream + (lane & 3) * (BITS * kRows) + 2 * (lane >> 2));
        left_ = m.panels.tiles - (lane & 3);
    }

    template <int H>
    HF_DEVICE void fetch(int step) {
        // Both sets of a step lie in one panel, unless panels are short.
        constexpr bool same = Stats::kTileShift >= 3;
        const int tile = step * kStepTiles + H * kTilesPerSet;
        if (H == 0 || !same) at_ = dev::keep(from_ + offset(tile));
        if (tile >= left_) return;
#pragma unroll
        for (int v = 0; v < BITS; ++v) {
            constexpr int further = same ? H * kTilesPerSet * BITS * kRows : 0;
            words[H][v] = dev::load_stream(reinterpret_cast<const uint2*>(at_ + further + v * kRows));
        }
    }

  private:
    // Of a tile that begins a set.
    HF_DEVICE int offset(int tile) const {
        const int tile_shift = Stats::kTileShift < 0 ? m_.panels.tile_shift : Stats::kTileShift;
        const int panel = tile >> tile_shift;
        const int stats = panel == m_.panels.last_panel ? m_.panels.last_stat_words : m_.panels.stat_words;
        return panel * m_.panels.panel_words + stats + (tile - (panel << tile_shift)) * (BITS * kRows);
    }

    const Matrix& m_;
    const uint32_t* from_;
    const uint32_t* at_ = nullptr;
    int left_;
};

// One set: acc += W x over its 128 columns. x[i] is chunk i of the lane's tile of set 0, of the lane's token.
template <class Stats, int BITS, int NT, int H>
HF_DEVICE void multiply_set(float (&acc)[NT][4], const uint2 (&words)[BITS], Stats& stats, const uint32_t (&x)[4]) {
    uint32_t w[2][BITS];
#pragma unroll
    for (int v = 0; v < BITS; ++v) {
        w[0][v] = words[v].x;
        w[1][v] = words[v].y;
    }
    Quarter q;
    stats.template quarter<H, 0>(q);
    multiply_quarter<BITS, NT, 0, Stats::kInteger, H>(acc, w, q, x[0]);
    stats.template quarter<H, 1>(q);
    multiply_quarter<BITS, NT, 1, Stats::kInteger, H>(acc, w, q, x[1]);
    stats.template quarter<H, 2>(q);
    multiply_quarter<BITS, NT, 2, Stats::kInteger, H>(acc, w, q, x[2]);
    stats.template quarter<H, 3>(q);
    multiply_quarter<BITS, NT, 3, Stats::kInteger, H>(acc, w, q, x[3]);
}

template <int NT>
HF_DEVICE void add_scaled(float (&total)[NT][4], const float (&acc)[NT][4], float even_row, float odd_row) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        total[j][0] = dev::fma(acc[j][0], even_row, total[j][0]);
        total[j][1] = dev::fma(acc[j][1], even_row, total[j][1]);
        total[j][2] = dev::fma(acc[j][2], odd_row, total[j][2]);
        total[j][3] = dev::fma(acc[j][3], odd_row, total[j][3]);
    }
}

template <class Stats, int BITS, int NT>
HF_DEVICE void multiply_step(float (&total)[NT][4], WordFetcher<Stats, BITS>& w, Stats& stats, int next,
                             const uint32_t (&x)[4]) {
    float acc[NT][4] = {};
    multiply_set<Stats, BITS, NT, 0>(acc, w.words[0], stats, x);
    w.template fetch<0>(next);
    if constexpr (Stats::kInteger) {
        add_scaled<NT>(total, acc, stats.factor(0, 0), stats.factor(0, 1));
        float second[NT][4] = {};
        multiply_set<Stats, BITS, NT, 1>(second, w.words[1], stats, x);
        add_scaled<NT>(total, second, stats.factor(1, 0), stats.factor(1, 1));
    } else {
        multiply_set<Stats, BITS, NT, 1>(acc, w.words[1], stats, x);
        add_scaled<NT>(total, acc, stats.factor(0, 0), stats.factor(0, 1));
    }
    w.template fetch<1>(next);
}

// Adds up the slices, adds outliers and bias, scales and writes. One warp per row and 8 tokens.
template <int NT, int ROW_BLOCKS, int SLICES>
HF_DEVICE void finish_rows(const LinearArgs& a, const float (&total)[NT][4], float* sums, int64_t first_token) {
    using Shape = LinearShape<NT, ROW_BLOCKS, SLICES>;
    constexpr int kBlockRows = ROW_BLOCKS * kRows;
    const int lane = dev::thread() & 31, warp = dev::thread() >> 5, g = lane >> 2, t = lane & 3;
    float* mine = sums + (warp * kRows + 2 * g) * Shape::kTokens + 2 * t;  // [slice][row][token]
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        mine[8 * j] = total[j][0];
        mine[8 * j + 1] = total[j][1];
        mine[Shape::kTokens + 8 * j] = total[j][2];
        mine[Shape::kTokens + 8 * j + 1] = total[j][3];
    }
    dev::sync_block();
    const int token = token_of(lane);
    for (int r = warp; r < kBlockRows; r += Shape::kWarps) {
        const int64_t row = dev::block_x() * kBlockRows + r;
        if (row >= a.weight.rows) break;
        for (int j = 0; j < NT && first_token + 8 * j < a.tokens; ++j) {
            float v[8] = {};
            if (a.weight.outlier) {
                multiply_outliers(v, a, int(row), first_token + 8 * j, lane);
                sum_tokens(v, lane);
            }
            const int64_t b = first_token + 8 * j + token;
            if ((lane & 3) == 0 && b < a.tokens) {
                float y = v[0];
#pragma unroll
                for (int s = 0; s < SLICES; ++s) y = dev::add(y, sums[(s * kBlockRows + r) * Shape::kTokens + 8 * j + token]);
                if (a.token_scale) y = dev::mul(y, a.token_scale[b]);
                if (a.bias) y = dev::add(y, read_as(a.bias, row, a.dtype));
                write_as(a.y, b * a.weight.rows + row, a.dtype, y);
            }
        }
    }
}

template <class Stats, int BITS, int NT, int ROW_BLOCKS, int SLICES, int BLOCKS_PER_SM>
HF_KERNEL(32 * ROW_BLOCKS * SLICES, BLOCKS_PER_SM) linear_kernel(const LinearArgs a) {
    using Shape = LinearShape<NT, ROW_BLOCKS, SLICES>;
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), g = lane >> 2, t = lane & 3;
    const int slice = warp / ROW_BLOCKS, which = warp % ROW_BLOCKS;
    const int64_t first_token = dev::block_y() * Shape::kTokens, last_block = (m.rows - 1) / kRows;
    const int tokens = int(a.tokens - first_token < Shape::kTokens ? a.tokens - first_token : Shape::kTokens);
    // Row blocks past the end repeat the last one; their rows are not written.
    const int64_t wanted = dev::block_x() * ROW_BLOCKS + which, row_block = wanted < last_block ? wanted : last_block;
    const uint32_t* stream = m.packed + row_block * m.panels.words;

    const int steps = (m.panels.tiles + kStepTiles - 1) / kStepTiles;

    // Shared memory: two buffers of x for each slice, statistics for each warp.
    const uint32_t shared = dev::shared_address(), buffer_bytes = Shape::x_tokens(tokens) * kTokenBytes;
    const uint32_t x_slice = shared + 2 * slice * buffer_bytes;
    Stats stats(m, stream, lane, slice, SLICES, shared + 2 * SLICES * buffer_bytes + warp * (Stats::kSharedWords * 4));
    WordFetcher<Stats, BITS> words(m, stream, lane);
    XFetcher<NT, ROW_BLOCKS, SLICES> x(a, first_token, tokens, which, slice, lane, x_slice);
    stats.prefetch(slice, slice < steps);
    words.template fetch<0>(slice);
    words.template fetch<1>(slice);
    x.fetch(0);

    // The lane's token g (or the last one) and tile t; chunk i of set h is at x_at[i] + 256 h.
    const int token = NT > 1 ? g : (g < tokens ? g : tokens - 1);
    uint32_t x_at[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x_at[i] = x_slice + token * kTokenBytes + 16 * x_place(4 * t + i, token);
    uint32_t buffer = 0;
    float total[NT][4] = {};
    // Where warps share x, all go through the loop equally often, because they meet in it.
    const int end = ROW_BLOCKS > 1 ? (steps + SLICES - 1) / SLICES * SLICES : steps;
    for (int step = slice; step < end; step += SLICES) {
        dev::wait_for_copies();
        if constexpr (ROW_BLOCKS > 1) {
            dev::sync_block();
        } else {
            dev::sync_warp();
        }
        const int next = step + SLICES;
        if (next < steps) x.fetch(buffer_bytes - buffer);
        if (ROW_BLOCKS == 1 || step < steps) {
            stats.decode(step);
            stats.prefetch(next, next < steps);
            dev::sync_warp();
            multiply_step<Stats, BITS, NT>(total, words, stats, next, x_at);
        }
        buffer = buffer_bytes - buffer;
        const uint32_t other = 2 * buffer - buffer_bytes;
#pragma unroll
        for (int i = 0; i < 4; ++i) x_at[i] += other;
    }
    dev::sync_block();
    finish_rows<NT, ROW_BLOCKS, SLICES>(a, total, reinterpret_cast<float*>(dev::shared_memory()), first_token);
}

}  // namespace hf_spqr
