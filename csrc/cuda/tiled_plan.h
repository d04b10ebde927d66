// How the kernel for 17 to 128 tokens (tiled.cuh) divides its work: decided on the host, known to both sides.
#pragma once
#include "cuda/kernels.h"
#include "cuda/operands.cuh"

namespace hf_spqr {

constexpr int kTiledWarps = 6, kTiledThreads = 32 * kTiledWarps;
constexpr int kTiledRowBlocks = 2;  // of a warp
constexpr int kTiledRows = kTiledWarps * kTiledRowBlocks * kRows;
constexpr int kTiledBlocksPerSm = 2;    // as the registers allow
constexpr int kTiledColumns = 1 << 20;  // at most
constexpr int kReservedShared = 1024;   // bytes that a multiprocessor keeps for itself, of each block

// Token tiles of a block: 64 tokens; or 32 where there are no more, and of 8-bit codes, whose words take the
// registers.
HF_CONSTANT int tiled_token_tiles(int bits, int tokens) {
    return bits == 8 || tokens <= 32 ? 4 : 8;
}

HF_CONSTANT int tiled_row_tiles(const Matrix& m) {
    return (m.rows + kTiledRows - 1) / kTiledRows;
}

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

template <class Stats>
int tiled_bytes(const Matrix& m, int tokens) {
    return tiled_token_tiles(m.bits, tokens) == 8 ? TiledMap<Stats, 8>::all(m) : TiledMap<Stats, 4>::all(m);
}

// In how many parts the columns are cut, whose sums are added up afterwards: so many that the blocks fill the device
// with as little as possible left over. A block takes about two steps' time to begin and to end. It has block_bytes of
// the most that the device gives one, which is all that a multiprocessor has but for kReservedShared.
inline int tiled_parts(const Matrix& m, int tokens, int multiprocessors, int block_bytes, int most_bytes) {
    const bool fit = kTiledBlocksPerSm * (block_bytes + kReservedShared) <= most_bytes + kReservedShared;
    const int blocks = fit ? kTiledBlocksPerSm : 1;
    const int steps = ceil_div(m.columns, kStepColumns), slots = blocks * multiprocessors;
    const int tiles = tiled_row_tiles(m) * ceil_div(tokens, 8 * tiled_token_tiles(m.bits, tokens));
    int best = 1, least = 0;
    for (int parts = 1; parts == 1 || 2 * parts <= steps; ++parts) {
        const int cost = ceil_div(tiles * parts, slots) * (ceil_div(steps, parts) + 2);
        if (least == 0 || cost < least) {
            best = parts;
            least = cost;
        }
    }
    return ceil_div(steps, ceil_div(steps, best));  // none is empty
}

// One per layout of statistics, each in a file of its own; kNoKernel where shared memory does not suffice.
int tiled_spqr16(const TiledArgs&, void* stream);
int tiled_spqr_any(const TiledArgs&, void* stream);
int tiled_affine32(const TiledArgs&, void* stream);
int tiled_affine64(const TiledArgs&, void* stream);
int tiled_affine128(const TiledArgs&, void* stream);
int tiled_affine_channel(const TiledArgs&, void* stream);
int tiled_affine_any(const TiledArgs&, void* stream);

}  // namespace hf_spqr
