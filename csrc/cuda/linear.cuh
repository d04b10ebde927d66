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

// Starts the copy of columns [256 step, + 256) of the slice's tokens; this warp's share is every ROW_BLOCKS-th token.
template <int ROW_BLOCKS>
HF_DEVICE void fetch_x(const LinearArgs& a, const uint16_t* x, int tokens, int step, int first, int lane, uint16_t* to) {
    const int column = step * kStepColumns + 8 * lane;
    const bool valid = column < a.x_stride;
    const uint16_t* from = x + (valid ? column : 0);
    for (int b = first; b < tokens; b += ROW_BLOCKS) {
        dev::copy_async(to + b * kStepColumns + 8 * x_place(lane, b), from + b * a.x_stride, valid);
    }
}

// Words of set h of a step, two rows at a time; zeros past the last tile.
template <class Stats, int BITS>
HF_DEVICE void fetch_set(uint2 (&w)[BITS], const Matrix& m, const uint32_t* stream, int step, int h, int lane) {
    const int first = step * kStepTiles + h * kTilesPerSet, t = lane & 3;
    const int tile_shift = Stats::kTileShift < 0 ? m.panels.tile_shift : Stats::kTileShift;
    const int panel = first >> tile_shift;
    const int stats = panel == m.panels.last_panel ? m.panels.last_stat_words : m.panels.stat_words;
    const uint32_t* from = stream + (panel * m.panels.panel_words + stats) +
                           (first - (panel << tile_shift) + t) * (BITS * kRows) + 2 * (lane >> 2);
    const bool valid = first + t < m.panels.tiles;
#pragma unroll
    for (int v = 0; v < BITS; ++v) {
        w[v] = make_uint2(0, 0);
        if (valid) w[v] = dev::load_stream(reinterpret_cast<const uint2*>(from + v * kRows));
    }
}

// One set: acc += W x over its 128 columns. `x` points at the lane's token, chunk 0 of its tile of set 0.
template <class Stats, int BITS, int NT, int H>
HF_DEVICE void multiply_set(float (&acc)[NT][4], const uint2 (&words)[BITS], const Stats& stats,
                            const unsigned char* const (&x)[4]) {
    uint32_t w[2][BITS];
#pragma unroll
    for (int v = 0; v < BITS; ++v) {
        w[0][v] = words[v].x;
        w[1][v] = words[v].y;
    }
    const auto chunk = [&](int i) {
        return [&x, i](int j) {
            return dev::load_shared(reinterpret_cast<const uint4*>(x[i] + H * 256 + j * 8 * kStepColumns * 2));
        };
    };
    Quarter q;
    stats.template quarter<H, 0>(q);
    multiply_quarter<BITS, NT, 0, Stats::kInteger>(acc, w, q, chunk(0));
    stats.template quarter<H, 1>(q);
    multiply_quarter<BITS, NT, 1, Stats::kInteger>(acc, w, q, chunk(1));
    stats.template quarter<H, 2>(q);
    multiply_quarter<BITS, NT, 2, Stats::kInteger>(acc, w, q, chunk(2));
    stats.template quarter<H, 3>(q);
    multiply_quarter<BITS, NT, 3, Stats::kInteger>(acc, w, q, chunk(3));
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
HF_DEVICE void multiply_step(float (&total)[NT][4], uint2 (&w0)[BITS], uint2 (&w1)[BITS], Stats& stats,
                             const Matrix& m, const uint32_t* stream, int next, int lane,
                             const unsigned char* const (&x)[4]) {
    float acc[NT][4] = {};
    multiply_set<Stats, BITS, NT, 0>(acc, w0, stats, x);
    fetch_set<Stats, BITS>(w0, m, stream, next, 0, lane);
    if constexpr (Stats::kInteger) {
        add_scaled<NT>(total, acc, stats.factor(0, 0), stats.factor(0, 1));
        float second[NT][4] = {};
        multiply_set<Stats, BITS, NT, 1>(second, w1, stats, x);
        add_scaled<NT>(total, second, stats.factor(1, 0), stats.factor(1, 1));
    } else {
        multiply_set<Stats, BITS, NT, 1>(acc, w1, stats, x);
        add_scaled<NT>(total, acc, stats.factor(0, 0), stats.factor(0, 1));
    }
    fetch_set<Stats, BITS>(w1, m, stream, next, 1, lane);
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
    unsigned char* shared = dev::shared_memory();
    const int lane = dev::thread() & 31, warp = dev::thread() >> 5, g = lane >> 2, t = lane & 3;
    const int slice = warp / ROW_BLOCKS, which = warp % ROW_BLOCKS;
    const int64_t first_token = dev::block_y() * Shape::kTokens, last_block = (m.rows - 1) / kRows;
    const int tokens = int(a.tokens - first_token < Shape::kTokens ? a.tokens - first_token : Shape::kTokens);
    const int room = Shape::x_tokens(tokens);
    // Row blocks past the end repeat the last one; their rows are not written.
    const int64_t wanted = dev::block_x() * ROW_BLOCKS + which, row_block = wanted < last_block ? wanted : last_block;
    const uint32_t* stream = m.packed + row_block * m.panels.words;
    const uint16_t* x = a.x + first_token * a.x_stride;

    const int x_half = room * kStepColumns;  // fp16 numbers in one of a slice's two buffers
    uint16_t* x_slice = reinterpret_cast<uint16_t*>(shared) + 2 * slice * x_half;
    Stats stats(m, stream, lane,
                reinterpret_cast<uint32_t*>(shared + 2 * SLICES * x_half * 2) + warp * Stats::kSharedWords);

    const int steps = (m.panels.tiles + kStepTiles - 1) / kStepTiles;
    uint2 w0[BITS], w1[BITS];
    stats.prefetch(slice);
    fetch_set<Stats, BITS>(w0, m, stream, slice, 0, lane);
    fetch_set<Stats, BITS>(w1, m, stream, slice, 1, lane);
    fetch_x<ROW_BLOCKS>(a, x, tokens, slice, which, lane, x_slice);

    // The lane's token g (or the last one) and tile t; chunk i of set h at byte x_at[i] + 256 h.
    const int token = NT > 1 ? g : (g < tokens ? g : tokens - 1);
    const unsigned char* x_at[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x_at[i] = reinterpret_cast<const unsigned char*>(x_slice + token * kStepColumns + 8 * x_place(4 * t + i, token));
    }
    int other = x_half * 2;  // bytes to the other buffer
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
        if (next < steps) {
            uint16_t* to = x_slice + (other > 0 ? x_half : 0);
            fetch_x<ROW_BLOCKS>(a, x, tokens, next, which, lane, to);
        }
        if (step < steps) {
            stats.decode(step);
            stats.prefetch(next);
            dev::sync_warp();
            multiply_step<Stats, BITS, NT>(total, w0, w1, stats, m, stream, next, lane, x_at);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) x_at[i] += other;
        other = -other;
    }
    dev::sync_block();
    finish_rows<NT, ROW_BLOCKS, SLICES>(a, total, reinterpret_cast<float*>(shared), first_token);
}

}  // namespace hf_spqr
