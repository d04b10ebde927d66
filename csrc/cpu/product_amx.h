// Products of AMX tiles: four sums of two by two tiles, so that each tile is loaded once for two products. Internal
// linkage (see vec.h).
#pragma once
#include "cpu/tiles_amx.h"

namespace hf_spqr {
namespace {

constexpr int kAmxTile = 1024;

struct TileProduct {
    const char* x;    // tiles of 16 tokens, one after another
    int64_t x_block;  // to those of the next 16 tokens
    const char* w;
    int64_t w_block;              // to the next row block
    int64_t w_stride, w_tile;     // between the rows of a tile, and between tiles
    int tiles;                    // products that are summed up
    char* sums;                   // [token][row], the next row block's 16 rows behind those of the first
    int64_t stride;               // from token to token
    bool add;                     // to the sums that are there
    const char* ahead = nullptr;  // memory to fetch meanwhile
    int ahead_lines = 0;          // of it with each tile
};

// For 16 * T tokens and R row blocks; of integers (int8 tokens, uint8 weights) or bf16.
template <bool Integers, int T, int R>
void multiply_tiles(const TileProduct& p) {
    char* const second = p.sums + 16 * p.stride;
    if (p.add) {
        HF_TILE_LOAD(0, p.sums, p.stride);
        if constexpr (R == 2) HF_TILE_LOAD(1, p.sums + 64, p.stride);
        if constexpr (T == 2) HF_TILE_LOAD(2, second, p.stride);
        if constexpr (T == 2 && R == 2) HF_TILE_LOAD(3, second + 64, p.stride);
    } else {
        HF_TILE_ZERO(0);
        if constexpr (R == 2) HF_TILE_ZERO(1);
        if constexpr (T == 2) HF_TILE_ZERO(2);
        if constexpr (T == 2 && R == 2) HF_TILE_ZERO(3);
    }
    const char *x = p.x, *w = p.w, *ahead = p.ahead;
    for (int i = 0; i < p.tiles; ++i, x += kAmxTile, w += p.w_tile) {
        HF_TILE_LOAD(4, x, 64);
        HF_TILE_LOAD(6, w, p.w_stride);
        if constexpr (R == 2) HF_TILE_LOAD(7, w + p.w_block, p.w_stride);
        if constexpr (T == 2) HF_TILE_LOAD(5, x + p.x_block, 64);
        if constexpr (Integers) {
            HF_TILE_DPBSUD(0, 4, 6);
            if constexpr (R == 2) HF_TILE_DPBSUD(1, 4, 7);
            if constexpr (T == 2) HF_TILE_DPBSUD(2, 5, 6);
            if constexpr (T == 2 && R == 2) HF_TILE_DPBSUD(3, 5, 7);
        } else {
            HF_TILE_DPBF16PS(0, 4, 6);
            if constexpr (R == 2) HF_TILE_DPBF16PS(1, 4, 7);
            if constexpr (T == 2) HF_TILE_DPBF16PS(2, 5, 6);
            if constexpr (T == 2 && R == 2) HF_TILE_DPBF16PS(3, 5, 7);
        }
        for (int line = 0; line < p.ahead_lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
    HF_TILE_STORE(0, p.sums, p.stride);
    if constexpr (R == 2) HF_TILE_STORE(1, p.sums + 64, p.stride);
    if constexpr (T == 2) HF_TILE_STORE(2, second, p.stride);
    if constexpr (T == 2 && R == 2) HF_TILE_STORE(3, second + 64, p.stride);
}

template <bool Integers>
inline void multiply_tiles(const TileProduct& p, bool two_tokens, bool two_blocks) {
    if (two_tokens) {
        (two_blocks ? multiply_tiles<Integers, 2, 2> : multiply_tiles<Integers, 2, 1>)(p);
    } else {
        (two_blocks ? multiply_tiles<Integers, 1, 2> : multiply_tiles<Integers, 1, 1>)(p);
    }
}

}  // namespace
}  // namespace hf_spqr
