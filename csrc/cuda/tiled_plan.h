// How the kernel for 17 to 128 tokens (tiled.cuh) divides its work: decided on the host, known to both sides.
#pragma once
#include "cuda/kernels.h"
#include "cuda/tile.cuh"

namespace hf_spqr {

constexpr int kTiledWarps = 6, kTiledThreads = 32 * kTiledWarps;
constexpr int kTiledRowBlocks = 2;  // of a warp
constexpr int kTiledRows = kTiledWarps * kTiledRowBlocks * kRows;
constexpr int kTiledBlocksPerSm = 2;          // as the registers allow
constexpr int kTiledSharedBytes = 77 * 1024;  // of a block of SpQR's usual layout, about
constexpr int kTiledColumns = 1 << 20;        // at most

// Token tiles of a block: 64 tokens; or 32 where there are no more, and of 8-bit codes, whose words take the
// registers.
HF_CONSTANT int tiled_token_tiles(int bits, int tokens) {
    return bits == 8 || tokens <= 32 ? 4 : 8;
}

HF_CONSTANT int tiled_row_tiles(const Matrix& m) {
    return (m.rows + kTiledRows - 1) / kTiledRows;
}

// In how many parts the columns are cut, whose sums are added up afterwards: so many that the blocks fill the device
// with as little as possible left over. A block takes about two steps' time to begin and to end. Of generations whose
// blocks have at most 99 KB of shared memory, a multiprocessor holds one.
inline int tiled_parts(const Matrix& m, int tokens, int multiprocessors, int shared_bytes) {
    const int blocks = shared_bytes < kTiledBlocksPerSm * kTiledSharedBytes ? 1 : kTiledBlocksPerSm;
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
int tiled_affine128(const TiledArgs&, void* stream);
int tiled_affine_channel(const TiledArgs&, void* stream);
int tiled_affine_any(const TiledArgs&, void* stream);

}  // namespace hf_spqr
