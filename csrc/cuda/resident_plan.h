// How the kernel for few tokens (resident.cuh) uses shared memory: decided on the host, known to both sides.
#pragma once
#include "cuda/kernels.h"
#include "cuda/x_place.cuh"

namespace hf_spqr {

constexpr int kResidentTokens = 16;
constexpr int kSlices = 8;  // warps of a group
constexpr int kGroupThreads = 32 * kSlices;
constexpr int kStages = 3;        // slots of a warp's ring
constexpr int kBatch = 8;         // row blocks whose sums wait for more of x
constexpr int kChunkStep = 2048;  // columns of x are taken in multiples of this: a step for each slice

// Groups of a block, for 8 * token_tiles tokens: as many as the registers hold.
HF_CONSTANT int most_groups(int token_tiles) {
    return token_tiles == 1 ? 2 : 1;
}

HF_CONSTANT int tile_bytes(int bits) {
    return bits * 64 + 32;
}

// One per layout of statistics, each in a file of its own; kNoKernel where x and rings do not fit.
int resident_spqr16(const ResidentArgs&, void* stream);
int resident_affine32(const ResidentArgs&, void* stream);
int resident_affine64(const ResidentArgs&, void* stream);
int resident_affine128(const ResidentArgs&, void* stream);
int resident_affine_channel(const ResidentArgs&, void* stream);

// Bytes in a block's shared memory; x is at 0.
struct ResidentMap {
    int x_sums, rings, ring_bytes, scratch, sums, waiting, cursors, scales, all;

    HF_CONSTANT ResidentMap(const ResidentPlan& plan, int columns, int tokens, int groups, int slot_bytes,
                            int scratch_bytes, bool sums_of_x)
        : x_sums(),
          rings(),
          ring_bytes(kStages * slot_bytes),
          scratch(),
          sums(),
          waiting(),
          cursors(),
          scales(),
          all() {
        const int warps = groups * kSlices;
        const bool in_stretches = plan.chunk_columns < columns;
        // Behind the last token's x there may be reads of tokens that do not exist.
        x_sums = (plan.chunk_columns / kStepColumns * tokens + padded(tokens) - tokens) * kTokenBytes;
        rings = x_sums + (sums_of_x ? plan.chunk_columns / kStepColumns * step_sums_bytes(tokens) : 0);
        rings = (rings + 15) / 16 * 16;
        scratch = rings + warps * ring_bytes;
        sums = scratch + warps * scratch_bytes;
        const int row_block = kRows * padded(tokens) * 4, batch = in_stretches ? groups * kBatch : 0;
        waiting = sums + groups * 2 * kSlices * row_block;  // [group][buffer][slice][row][token]
        cursors = waiting + batch * row_block;              // [group][row block][row][token]
        scales = cursors + batch * kRows * 4;               // [group][row block][row]
        all = scales + kResidentTokens * 4 * (2 + warps);   // up, down, [warp][token] for their maximum
    }

    // Tokens that sums have room for: a power of two, at least what a lane of an mma holds side by side.
    static HF_CONSTANT int padded(int tokens) { return tokens <= 2 ? 2 : tokens <= 4 ? 4 : tokens <= 8 ? 8 : 16; }
    static HF_CONSTANT int step_sums_bytes(int tokens) { return (tokens + 1) / 2 * 16; }
};

}  // namespace hf_spqr
