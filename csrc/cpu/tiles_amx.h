// The instructions of AMX, and how all our kernels use its eight tiles of 16 rows of 64 bytes. A tile's number must be
// a literal. With HF_SPQR_EMU_AMX plain C++ takes the place of the instructions (csrc/emu/amx.h), so that tests run
// the kernels where there is no AMX. Internal linkage (see vec.h).
#pragma once
#include <immintrin.h>
#include <cstdint>
#if defined(HF_SPQR_EMU_AMX)
#include "emu/amx.h"
#else
// Compilers do not know what memory a tile is loaded from: what was written before must be there.
#define HF_TILE_LOAD(tile, from, stride)   \
    do {                                   \
        __asm__ volatile("" ::: "memory"); \
        _tile_loadd(tile, from, stride);   \
    } while (0)
#define HF_TILE_STORE(tile, to, stride)    \
    do {                                   \
        _tile_stored(tile, to, stride);    \
        __asm__ volatile("" ::: "memory"); \
    } while (0)
#define HF_TILE_ZERO(tile) _tile_zero(tile)
#define HF_TILE_DPBF16PS(sum, x, w) _tile_dpbf16ps(sum, x, w)  // fp32 += bf16 bf16
#define HF_TILE_DPBSUD(sum, x, w) _tile_dpbsud(sum, x, w)      // int32 += int8 uint8
#endif

namespace hf_spqr {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
};

#if !defined(HF_SPQR_EMU_AMX)
inline void configure_tiles(const TileConfig& config) {
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}
inline void release_tiles() {
    _tile_release();
}
#else
inline void configure_tiles(const TileConfig& config) {
    emu::configure_tiles(config.palette, config.start_row, config.bytes, config.rows);
}
inline void release_tiles() {
    emu::release_tiles();
}
#endif

// This thread's tiles as long as this lives: 0 to 3 sums of 16 tokens (rows) and 16 rows of weights (32-bit words);
// 4, 5 16 tokens; 6, 7 weights, a row for each word of a token. Released tiles cost nothing at a context switch.
struct Tiles {
    explicit Tiles(int words) {
        TileConfig config;
        for (int i = 0; i < 8; ++i) {
            config.bytes[i] = i == 4 || i == 5 ? uint16_t(4 * words) : 64;
            config.rows[i] = i < 6 ? 16 : uint8_t(words);
        }
        configure_tiles(config);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() { release_tiles(); }
};

}  // namespace
}  // namespace hf_spqr
