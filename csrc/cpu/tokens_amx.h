// bf16 activations in the order in which AMX takes them, and how a matrix is multiplied by them. Internal linkage (see
// vec.h).
#pragma once
#include "cpu/halves.h"

namespace hf_spqr {
namespace {

constexpr int kTokenTile = 16;   // tokens of a tile
constexpr int kStageTiles = 16;  // of weights, unpacked at a time: two row blocks of them fit the nearest cache
constexpr int kTileWords = 256;  // of 16 tokens x 32 columns, or of 32 columns x 16 rows of weights

// Whether codes are multiplied as they are, and scales applied to sums: not to those of less than a tile.
inline bool takes_codes(const Matrix& m, int64_t tokens) {
    return !rounds_weights(m, tokens) && m.outlier_row == nullptr && (m.group == kPerChannel || m.group >= kColumns);
}

// Tiles of codes whose products have one sum, of a stage: of a group, or all.
inline int tiles_of_sum(const Matrix& m) {
    return m.group == kPerChannel ? kStageTiles : m.group / kColumns;
}

// Where the parts lie:
// - [token / 16][tile]: 16 tokens x 32 columns, zero padded both ways;
// - [block][token]: minus the sum of the columns of a group in fp32, or of all columns per channel; only for codes.
struct TokenTiles {
    int64_t tiles, token_blocks, blocks, group_tiles;
    char* memory;

    TokenTiles(const Matrix& m, int64_t tokens, char* start) : memory(start) {
        tiles = ceil_div(m.columns, kColumns);
        token_blocks = ceil_div(tokens, kTokenTile);
        group_tiles = m.group == kPerChannel ? tiles : tiles_of_sum(m);
        blocks = takes_codes(m, tokens) ? ceil_div(tiles, group_tiles) : 0;
    }
    int64_t block_bytes() const { return tiles * kTileWords * 4; }  // of 16 tokens
    int64_t bytes() const { return token_blocks * (block_bytes() + blocks * kTokenTile * 4); }
    char* token_block(int64_t i) const { return memory + i * block_bytes(); }
    float* minus_sum(int64_t block) const {
        return reinterpret_cast<float*>(token_block(token_blocks)) + block * token_blocks * kTokenTile;
    }
};

}  // namespace
}  // namespace hf_spqr
