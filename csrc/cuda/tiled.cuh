// W x for 17 to 128 tokens, straight from the packed weights, as sums for finish_kernel.
//
// A block takes 192 rows, 8 * NT tokens and a part of the columns; each of its warps 32 rows. Of every half set, 16
// columns of each of four tiles, a warp makes fp16 weights in shared memory, adds the outliers to them, and multiplies
// them with the block's tokens. So weights are decoded once for 64 tokens, and outliers cost no more than for one. x
// comes by cp.async, a set ahead; words come half a set ahead, statistics a step.
//
// Sums are those of weights divided by a unit, a power of two that fits a step's largest weight into fp16 (factor() of
// the statistics): of a row block, or of each row where its scales are its own. When it changes from one step to the
// next, the sums change along. Units of rows never become smaller; those of row blocks may, because of outliers, which
// are as large as a thousand other weights.
#pragma once
#include "cuda/fragment.cuh"
#include "cuda/operands.cuh"
#include "cuda/row_block.cuh"
#include "cuda/step_outliers.cuh"
#include "cuda/tiled_plan.h"

namespace hf_spqr {

// Fetches x set by set: a thread 8 columns of every 12th token. Tokens that are not there and columns past the end are
// zeros. A second half set has its tiles in the order 2, 3, 0, 1, so that eight threads, which fetch 64 columns of a
// token, write to all banks once. As little as possible is kept in registers from one set to the next.
template <int NT>
class TiledX {
  public:
    HF_DEVICE TiledX(const TiledArgs& a, int first_token) : a_(a), tokens_(a.tokens - first_token) {
        const int tile = chunk() >> 2, half = chunk() >> 1 & 1;
        from_ = int(dev::keep(uint32_t((first_token + token()) * int(a.x_stride) + 8 * chunk())));
        to_ = dev::keep(half * (8 * NT * kOperandBytes) + token() * kOperandBytes +
                        chunk_place(2 * tile_place(tile, half) + (chunk() & 1), token() & 7));
    }

    // Where a tile's columns of a half set lie among those of the others.
    static HF_CONSTANT int tile_place(int tile, int half) { return tile ^ 2 * half; }

    // 128 columns from `column` on.
    HF_DEVICE void fetch(int column, uint32_t buffer) const {
        fetch_tokens<0>(a_.x + (from_ + column), buffer, column + 8 * chunk() < a_.x_stride ? tokens_ - token() : 0);
    }

  private:
    static constexpr int kTokensAtOnce = kTiledThreads / 16;
    static_assert(kTokensAtOnce % 8 == 4, "for the key of a token");

    static HF_DEVICE int chunk() { return dev::thread() & 15; }
    static HF_DEVICE int token() { return dev::thread() >> 4; }

    template <int I>
    HF_DEVICE void fetch_tokens(const uint16_t* from, uint32_t buffer, int there) const {
        constexpr int kToken = I * kTokensAtOnce;
        const uint32_t to = buffer + kToken * kOperandBytes + (to_ ^ chunk_place(0, kToken & 4));
        const bool wanted = kToken + kTokensAtOnce <= 8 * NT || token() < 8 * NT - kToken;
        dev::copy_async<0>(to, dev::at_stride<kToken>(from, int(a_.x_stride)), kToken < there ? 16 : 0, wanted);
        if constexpr (kToken + kTokensAtOnce < 8 * NT) fetch_tokens<I + 1>(from, buffer, there);
    }

    const TiledArgs& a_;
    int tokens_, from_;
    uint32_t to_;
};

// Towards the L2 cache, on behalf of a warp: the codes of a step, and the statistics that lie before them.
template <class Stats, int BITS>
HF_DEVICE void prefetch_step(const Matrix& m, int64_t first_block, int step) {
    constexpr int kLine = 32, kLines = 16;  // words; of a row block, by half of the warp
    const int lane = dev::thread() & 31;
    const int64_t block = first_block + lane / kLines;
    const int first = Stats::kTileShift == 3 ? step * m.panels.panel_words : tile_offset(m, step * kStepTiles);
    const int at = first + lane % kLines * kLine;
    if (at < m.panels.words) dev::prefetch(row_block_words(m, block) + at);
}

// Quarter I of the lane's tile in set H: 8 columns of its two rows, to shared memory.
template <class Stats, int BITS, int H, int I>
HF_DEVICE void put_quarter(RowBlock<Stats, BITS>& block, uint32_t to) {
    uint32_t w[2][BITS];
    block.words.template split<H>(w);
    Quarter q;
    block.stats.template quarter<H, I>(q);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        dev::store_shared(to + r * kOperandBytes, uint4{weight_pair<BITS, 4 * I, Stats::kSubtract>(w[r], q, r),
                                                        weight_pair<BITS, 4 * I + 1, Stats::kSubtract>(w[r], q, r),
                                                        weight_pair<BITS, 4 * I + 2, Stats::kSubtract>(w[r], q, r),
                                                        weight_pair<BITS, 4 * I + 3, Stats::kSubtract>(w[r], q, r)});
    }
}

// A warp's 32 rows.
template <class Stats, int BITS, int NT, bool OUTLIERS>
class TiledWarp {
  public:
    HF_DEVICE TiledWarp(const Matrix& m, int64_t first_block, int first_step, uint32_t shared)
        : TiledWarp(m, first_block, first_step, shared, dev::uniform(dev::thread() >> 5), dev::thread() & 31) {}

    // What the step begins with, on its way.
    HF_DEVICE void fetch(int step) {
#pragma unroll
        for (int r = 0; r < kTiledRowBlocks; ++r) {
            blocks_.each[r].stats.prefetch(step);
            blocks_.each[r].words.template fetch_set<0>(step);
        }
        if (OUTLIERS && outliers_.any()) outliers_.fetch();
    }

    // Statistics of the step; those of `next`, unless there is none, on their way.
    HF_DEVICE void decode(int step, int next) {
        float outlier = 0.f;
        if (OUTLIERS && outliers_.any()) outlier = outliers_.begin((step + 1) * kStepColumns);
#pragma unroll
        for (int r = 0; r < kTiledRowBlocks; ++r) {
            Stats& stats = blocks_.each[r].stats;
            if constexpr (Stats::kRowScales) {
                stats.decode(step, unit_[r]);
            } else {
                // A unit far below the sums that there are would take them out of the range of fp32.
                const float sums = dev::mul(largest_unit_, kLeastUnit);
                stats.decode(step, fmaxf(sums, in_second() == (r == 1) ? outlier : 0.f));
                largest_unit_ = fmaxf(largest_unit_, stats.factor(0));
            }
#pragma unroll
            for (int u = 0; u < kUnits; ++u) change_unit(r, u, stats.factor(u));
            if (next >= 0) stats.prefetch(next);
        }
        if (OUTLIERS && outliers_.any()) outliers_.scale((step + 1) * kStepColumns, up_of_row());
    }

    // Adds half HALF of set H of the step to the sums. When a set's words are used up, the next ones are on their way.
    template <int H, int HALF>
    HF_DEVICE void multiply(int step, int next, uint32_t shared, uint32_t x_buffer) {
        dev::sync_warp();
#pragma unroll
        for (int r = 0; r < kTiledRowBlocks; ++r) {
            blocks_.each[r].stats.template load_set<H>();
            put_quarter<Stats, BITS, H, 2 * HALF>(blocks_.each[r], put_ + r * Map::kRowBlockBytes);
            put_quarter<Stats, BITS, H, 2 * HALF + 1>(blocks_.each[r],
                                                      (put_ ^ chunk_place(1, 0)) + r * Map::kRowBlockBytes);
            if (HALF == 1 && H == 0) blocks_.each[r].words.template fetch_set<1>(step);
            if (HALF == 1 && H == 1 && next >= 0) blocks_.each[r].words.template fetch_set<0>(next);
        }
        dev::sync_warp();
        if (OUTLIERS && outliers_.any()) {
            outliers_.template add<H, HALF>((step + 1) * kStepColumns, up_of_row(),
                                            shared + Map::kWeights + dev::thread() * kOperandBytes);
            if (H == 1 && HALF == 1) outliers_.fetch();
            dev::sync_warp();
        }
#pragma unroll 1
        for (int k = 0; k < kTilesPerSet; ++k) {
            uint32_t w[kTiledRowBlocks][4];
#pragma unroll
            for (int r = 0; r < kTiledRowBlocks; ++r) operands_.weights(w[r], 0, r, k);
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                uint32_t x[4];
                operands_.x(x, x_buffer + HALF * Map::kHalfBytes, j / 2, TiledX<NT>::tile_place(k, HALF));
#pragma unroll
                for (int r = 0; r < kTiledRowBlocks; ++r) {
                    dev::mma_f16(sums_[r][j], w[r], x[0], x[1]);
                    dev::mma_f16(sums_[r][j + 1], w[r], x[2], x[3]);
                }
            }
        }
    }

    // To `to`, where the sums of row block r, token 0 lie at r * kRows, those of the next token `stride` further. Each
    // token's times `scale`, if there is one.
    HF_DEVICE void write(float* to, int64_t stride, int row_blocks, int tokens, const float* scale) const {
        const int lane = dev::thread() & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int token = 8 * j + 2 * t + e;
                if (token >= tokens) continue;
                const float of_token = scale ? scale[token] : 1.f;
                // In this order: what the factors come to may be far beyond fp32, or far below it, before the last.
                const auto y = [&](float sum, float unit) {
                    return dev::mul(dev::mul(dev::mul(sum, of_token), unit), Stats::kFactor);
                };
#pragma unroll
                for (int r = 0; r < kTiledRowBlocks; ++r) {
                    if (r >= row_blocks) break;
                    *reinterpret_cast<float2*>(to + token * stride + r * kRows + 2 * g) =
                        make_float2(y(sums_[r][j][e], unit_[r][0]), y(sums_[r][j][2 + e], unit_[r][kUnits - 1]));
                }
            }
        }
    }

  private:
    using Map = TiledMap<Stats, NT>;
    static constexpr int kUnits = Stats::kRowScales ? 2 : 1;     // of a row block, for a lane's two rows
    static constexpr float kLeastUnit = 1.f / float(1ll << 45);  // of the largest, so that 2^60 is between the two

    HF_DEVICE TiledWarp(const Matrix& m, int64_t first_block, int first_step, uint32_t shared, int warp, int lane)
        : blocks_(std::make_integer_sequence<int, kTiledRowBlocks>{}, m, first_block, lane, first_step, 1,
                  shared + Map::kStats + warp * (kTiledRowBlocks * Map::stat_bytes(m)), Map::stat_bytes(m)),
          outliers_(m, first_block * kRows + lane, first_step * kStepColumns, lane >> 1 & 7),
          operands_(weights_of(shared, warp), shared, lane),
          put_(dev::keep(weights_of(shared, warp) + 2 * (lane >> 2) * kOperandBytes +
                         chunk_place(2 * (lane & 3), lane >> 2))) {}

    static HF_CONSTANT uint32_t weights_of(uint32_t shared, int warp) {
        return shared + Map::kWeights + warp * Map::kWarpBytes;
    }
    // 1 / a power of two.
    static HF_DEVICE float inverse(float power) { return dev::as_float((254u << 23) - dev::as_bits(power)); }
    // Whether the row of which the lane adds outliers is in the second row block.
    static HF_DEVICE bool in_second() { return dev::thread() & kRows; }
    HF_DEVICE float up_of_row() const { return inverse(in_second() ? unit_[1][0] : unit_[0][0]); }

    HF_DEVICE void change_unit(int r, int u, float unit) {
        if (unit == unit_[r][u]) return;
        const float factor = dev::mul(unit_[r][u], inverse(unit));
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (kUnits == 1 || e >> 1 == u) sums_[r][j][e] = dev::mul(sums_[r][j][e], factor);
            }
        }
        unit_[r][u] = unit;
    }

    RowBlocks<Stats, BITS, kTiledRowBlocks> blocks_;
    StepOutliers outliers_;
    Operands operands_;
    uint32_t put_;  // where the lane's weights go
    float sums_[kTiledRowBlocks][NT][4] = {};
    float unit_[kTiledRowBlocks][kUnits] = {}, largest_unit_ = 0.f;
};

// What a block has to do.
struct TiledBlock {
    int first_step, end_step, part, first_token;
    int64_t first_row_block;  // of the thread's warp

    HF_DEVICE TiledBlock(const TiledArgs& a, int block, int tokens) {
        const Panels& p = a.weight.panels;
        const int row_tiles = tiled_row_tiles(a.weight), warp = dev::uniform(dev::thread() >> 5);
        const int steps = (p.tiles + kStepTiles - 1) / kStepTiles, part_steps = (steps + a.parts - 1) / a.parts;
        part = block / row_tiles;
        first_step = part * part_steps;
        end_step = first_step + part_steps < steps ? first_step + part_steps : steps;
        first_token = int(dev::block_y()) * tokens;
        first_row_block = (int64_t(block % row_tiles) * kTiledWarps + warp) * kTiledRowBlocks;
    }
};

template <class Stats, int BITS, int NT, bool OUTLIERS>
HF_KERNEL(kTiledThreads, kTiledBlocksPerSm)
tiled_kernel(const TiledArgs a) {
    using Map = TiledMap<Stats, NT>;
    const uint32_t shared = dev::shared_address();
    const TiledBlock block(a, int(dev::block_x()), Map::kTokens);
    dev::let_next_kernel_start();
    // What the kernel before this one in the stream wrote may be read only when it has ended.
    prefetch_step<Stats, BITS>(a.weight, block.first_row_block, block.first_step);
    dev::wait_for_kernel();
    const TiledX<NT> x(a, block.first_token);
    x.fetch(block.first_step * kStepColumns, shared);
    TiledWarp<Stats, BITS, NT, OUTLIERS> mine(a.weight, block.first_row_block, block.first_step, shared);
    mine.fetch(block.first_step);
    for (int step = block.first_step; step < block.end_step; ++step) {
        const int next = step + 1 < block.end_step ? step + 1 : -1;
        dev::wait_for_copies();
        dev::sync_block();
        x.fetch(step * kStepColumns + kStepColumns / 2, shared + Map::kSetBytesOfX);
        mine.decode(step, next);
        mine.template multiply<0, 0>(step, next, shared, 0);
        mine.template multiply<0, 1>(step, next, shared, 0);
        dev::wait_for_copies();
        dev::sync_block();
        if (next >= 0) x.fetch(next * kStepColumns, shared);
        mine.template multiply<1, 0>(step, next, shared, Map::kSetBytesOfX);
        mine.template multiply<1, 1>(step, next, shared, Map::kSetBytesOfX);
    }
    // Computed again, instead of being kept in registers throughout.
    const TiledBlock same(a, int(dev::keep(uint32_t(dev::block_x()))), Map::kTokens);
    const int row_blocks = (a.weight.rows + kRows - 1) / kRows;
    const int64_t stride = int64_t(row_blocks) * kRows;
    mine.write(a.sums + (int64_t(same.part) * a.tokens + same.first_token) * stride + same.first_row_block * kRows,
               stride, int(row_blocks - same.first_row_block), a.tokens - same.first_token,
               a.token_scale ? a.token_scale + same.first_token : nullptr);
}

}  // namespace hf_spqr
