// W x for 17 to 128 tokens, straight from the packed weights, as sums for finish_kernel.
//
// A block takes 192 rows, 8 * NT tokens and a part of the columns; each of its warps 32 rows. Of every half set, 16
// columns of each of four tiles, a warp makes fp16 weights in shared memory, adds the outliers to them, and multiplies
// them with the block's tokens. So weights are decoded once for 64 tokens, and outliers cost no more than for one. x
// comes by cp.async, a set ahead, words and statistics a step ahead.
//
// Sums are those of weights divided by a power of two that fits a step's largest weight into fp16 (factor() of the
// statistics); when that changes from one step to the next, the sums change along.
#pragma once
#include "cuda/fragment.cuh"
#include "cuda/operands.cuh"
#include "cuda/row_block.cuh"
#include "cuda/step_outliers.cuh"
#include "cuda/tiled_plan.h"

namespace hf_spqr {

// A block's shared memory: two buffers of x, then of each warp weights, then of each warp statistics.
template <class Stats, int NT>
struct TiledMap {
    static constexpr int kTokens = 8 * NT;
    static constexpr int kHalfBytes = kTokens * kOperandBytes;  // of x
    static constexpr int kSetBytesOfX = 2 * kHalfBytes;
    static constexpr int kRowBlockBytes = kRows * kOperandBytes, kWarpBytes = kTiledRowBlocks * kRowBlockBytes;
    static constexpr int kWeights = 2 * kSetBytesOfX;
    static constexpr int kStats = kWeights + kTiledWarps * kWarpBytes;

    static HF_CONSTANT int stat_bytes(const Matrix& m) { return Stats::shared_words(m) * 4; }  // of a row block
    static HF_CONSTANT int all(const Matrix& m) { return kStats + kTiledWarps * kTiledRowBlocks * stat_bytes(m); }
};

// Fetches x of one set after the other: a thread 8 columns of every 12th token. Tokens that are not there and columns
// past the end are zeros.
template <int NT>
class TiledX {
  public:
    HF_DEVICE TiledX(const TiledArgs& a, int64_t first_token, int first_column) {
        const int chunk = dev::thread() & 15, tile = chunk >> 2, half = chunk >> 1 & 1, token = dev::thread() >> 4;
        from_ = a.x + (first_token + token) * a.x_stride + first_column + 8 * chunk;
        stride_ = int(a.x_stride);
        columns_ = int(a.x_stride) - first_column - 8 * chunk;
        tokens_ = int(a.tokens - first_token) - token;
        room_ = 8 * NT - token;
        to_ = half * (8 * NT * kOperandBytes) + token * kOperandBytes +
              chunk_place(2 * tile + (chunk & 1), token & 7);
    }

    HF_DEVICE void fetch(uint32_t buffer) {
        fetch_tokens<0>(buffer);
        from_ += kStepColumns / 2;
        columns_ -= kStepColumns / 2;
    }

  private:
    static constexpr int kTokensAtOnce = kTiledThreads / 16;
    static_assert(kTokensAtOnce % 8 == 4, "for the key of a token");

    template <int I>
    HF_DEVICE void fetch_tokens(uint32_t buffer) {
        constexpr int token = I * kTokensAtOnce;
        const uint32_t to = buffer + token * kOperandBytes + (to_ ^ chunk_place(0, token & 4));
        const bool there = columns_ > 0 && token < tokens_;
        dev::copy_async<0>(to, dev::at_stride<token>(from_, stride_), there ? 16 : 0, token < room_);
        if constexpr (token + kTokensAtOnce < 8 * NT) fetch_tokens<I + 1>(buffer);
    }

    const uint16_t* from_;
    int stride_, columns_, tokens_, room_;
    uint32_t to_;
};

// Quarter I of the lane's tile in set H: 8 columns of its two rows, to chunk `chunk` of row 2g at `to`.
template <class Stats, int BITS, int H, int I>
HF_DEVICE void put_quarter(RowBlock<Stats, BITS>& block, uint32_t to, uint32_t place) {
    uint32_t w[2][BITS];
    block.words.template split<H>(w);
    Quarter q;
    block.stats.template quarter<H, I>(q);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        dev::store_shared(to + r * kOperandBytes + place,
                          uint4{weight_pair<BITS, 4 * I, Stats::kSubtract>(w[r], q, r),
                                weight_pair<BITS, 4 * I + 1, Stats::kSubtract>(w[r], q, r),
                                weight_pair<BITS, 4 * I + 2, Stats::kSubtract>(w[r], q, r),
                                weight_pair<BITS, 4 * I + 3, Stats::kSubtract>(w[r], q, r)});
    }
}

// A warp's 32 rows.
template <class Stats, int BITS, int NT, bool OUTLIERS>
class TiledWarp {
  public:
    HF_DEVICE TiledWarp(const Matrix& m, int64_t first_block, int first_step, int warp, int lane, uint32_t shared)
        : blocks_(std::make_integer_sequence<int, kTiledRowBlocks>{}, m, first_block, lane, first_step, 1,
                  shared + Map::kStats + warp * (kTiledRowBlocks * Map::stat_bytes(m)), Map::stat_bytes(m)),
          outliers_(m, first_block * kRows + lane, first_step * kStepColumns),
          operands_(shared + Map::kWeights + warp * Map::kWarpBytes, shared, lane),
          weights_(shared + Map::kWeights + warp * Map::kWarpBytes),
          lane_(lane) {}

    // All that a step needs from memory, but x.
    HF_DEVICE void fetch(int step) {
#pragma unroll
        for (int r = 0; r < kTiledRowBlocks; ++r) blocks_.each[r].fetch(step);
        if (OUTLIERS && outliers_.any()) outliers_.fetch();
    }

    // Statistics of the step; those of `next`, unless there is none, on their way.
    HF_DEVICE void decode(int step, int next) {
        float outlier = 0.f;
        if (OUTLIERS && outliers_.any()) outlier = outliers_.count((step + 1) * kStepColumns);
#pragma unroll
        for (int r = 0; r < kTiledRowBlocks; ++r) {
            // A unit far below the sums that there are would take them out of the range of fp32.
            const float sums = dev::mul(largest_unit_[r], kLeastUnit);
            Stats& stats = blocks_.each[r].stats;
            stats.decode(step, fmaxf(sums, lane_ >> 4 == r ? outlier : 0.f));
            change_unit(r, stats.factor());
            if (next >= 0) stats.prefetch(next);
        }
    }

    // Sums of half HALF of set H of the step; after the last one of a set its words of `next` are on their way.
    template <int H, int HALF>
    HF_DEVICE void multiply(int step, int next, uint32_t x_buffer) {
        const int g = lane_ >> 2, t = lane_ & 3;
        dev::sync_warp();
#pragma unroll
        for (int r = 0; r < kTiledRowBlocks; ++r) {
            const uint32_t to = weights_ + r * Map::kRowBlockBytes + 2 * g * kOperandBytes;
            blocks_.each[r].stats.template load_set<H>();
            put_quarter<Stats, BITS, H, 2 * HALF>(blocks_.each[r], to, chunk_place(2 * t, g));
            put_quarter<Stats, BITS, H, 2 * HALF + 1>(blocks_.each[r], to, chunk_place(2 * t + 1, g));
            if (HALF == 1 && next >= 0) blocks_.each[r].words.template fetch<H>(next);
        }
        dev::sync_warp();
        if (OUTLIERS && outliers_.any()) {
            outliers_.template add<H, HALF>(step * kStepColumns, weights_ + lane_ * kOperandBytes, lane_ >> 1 & 7,
                                            inverse(lane_ < kRows ? unit_[0] : unit_[1]));
            if (H == 1 && HALF == 1) {
                outliers_.advance();
                outliers_.fetch();
            }
            dev::sync_warp();
        }
#pragma unroll
        for (int k = 0; k < kTilesPerSet; ++k) {
            uint32_t w[kTiledRowBlocks][4];
#pragma unroll
            for (int r = 0; r < kTiledRowBlocks; ++r) operands_.weights(w[r], 0, r, k);
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                uint32_t x[4];
                operands_.x(x, x_buffer + HALF * Map::kHalfBytes, j / 2, k);
#pragma unroll
                for (int r = 0; r < kTiledRowBlocks; ++r) {
                    dev::mma_f16(sums_[r][j], w[r], x[0], x[1]);
                    dev::mma_f16(sums_[r][j + 1], w[r], x[2], x[3]);
                }
            }
        }
    }

    // To `to`, where the sums of row block r, token 0 lie at r * kRows, those of the next token `stride` further.
    HF_DEVICE void write(float* to, int64_t stride, int row_blocks, int tokens) const {
        const int g = lane_ >> 2, t = lane_ & 3;
#pragma unroll
        for (int r = 0; r < kTiledRowBlocks; ++r) {
            if (r >= row_blocks) break;
#pragma unroll
            for (int j = 0; j < NT; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int token = 8 * j + 2 * t + e;
                    if (token >= tokens) continue;
                    *reinterpret_cast<float2*>(to + token * stride + r * kRows + 2 * g) =
                        make_float2(dev::mul(sums_[r][j][e], unit_[r]), dev::mul(sums_[r][j][2 + e], unit_[r]));
                }
            }
        }
    }

  private:
    using Map = TiledMap<Stats, NT>;
    static constexpr float kLeastUnit = 1.f / float(1ll << 45);  // of the largest, so that 2^60 is between the two

    // 1 / a power of two.
    static HF_DEVICE float inverse(float power) { return dev::as_float((254u << 23) - dev::as_bits(power)); }

    HF_DEVICE void change_unit(int r, float unit) {
        largest_unit_[r] = fmaxf(largest_unit_[r], unit);
        if (unit == unit_[r]) return;
        const float factor = dev::mul(unit_[r], inverse(unit));
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums_[r][j][e] = dev::mul(sums_[r][j][e], factor);
        }
        unit_[r] = unit;
    }

    RowBlocks<Stats, BITS, kTiledRowBlocks> blocks_;
    StepOutliers outliers_;
    Operands operands_;
    uint32_t weights_;
    int lane_;
    float sums_[kTiledRowBlocks][NT][4] = {};
    float unit_[kTiledRowBlocks] = {1.f, 1.f}, largest_unit_[kTiledRowBlocks] = {};
};

template <class Stats, int BITS, int NT, bool OUTLIERS>
HF_KERNEL(kTiledThreads, kTiledBlocksPerSm)
tiled_kernel(const TiledArgs a) {
    using Map = TiledMap<Stats, NT>;
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), row_tiles = tiled_row_tiles(m);
    const int part = int(dev::block_x()) / row_tiles, tile = int(dev::block_x()) % row_tiles;
    const int steps = (m.panels.tiles + kStepTiles - 1) / kStepTiles, part_steps = (steps + a.parts - 1) / a.parts;
    const int first = part * part_steps, end = first + part_steps < steps ? first + part_steps : steps;
    const int64_t first_token = dev::block_y() * Map::kTokens;
    const int64_t first_block = (int64_t(tile) * kTiledWarps + warp) * kTiledRowBlocks;
    const uint32_t shared = dev::shared_address();
    dev::let_next_kernel_start();
    dev::wait_for_kernel();
    TiledX<NT> x(a, first_token, first * kStepColumns);
    x.fetch(shared);
    TiledWarp<Stats, BITS, NT, OUTLIERS> mine(m, first_block, first, warp, lane, shared);
    mine.fetch(first);
    for (int step = first; step < end; ++step) {
        const int next = step + 1 < end ? step + 1 : -1;
        dev::wait_for_copies();
        dev::sync_block();
        x.fetch(shared + Map::kSetBytesOfX);
        mine.decode(step, next);
        mine.template multiply<0, 0>(step, next, 0);
        mine.template multiply<0, 1>(step, next, 0);
        dev::wait_for_copies();
        dev::sync_block();
        if (next >= 0) x.fetch(shared);
        mine.template multiply<1, 0>(step, next, Map::kSetBytesOfX);
        mine.template multiply<1, 1>(step, next, Map::kSetBytesOfX);
    }
    const int row_blocks = (m.rows + kRows - 1) / kRows;
    const int64_t stride = int64_t(row_blocks) * kRows;
    mine.write(a.sums + (int64_t(part) * a.tokens + first_token) * stride + first_block * kRows, stride,
               int(row_blocks - first_block), int(a.tokens - first_token));
}

}  // namespace hf_spqr
