// AMX in plain C++, for tests on machines without it: eight tiles for each thread, and what the manual says of every
// instruction that we use ("Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2). What would fault
// ends the program. Not covered: speed, and what a compiler makes of the real instructions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define HF_TILE_LOAD(tile, from, stride) ::hf_spqr::emu::load_tile(tile, from, stride)
#define HF_TILE_STORE(tile, to, stride) ::hf_spqr::emu::store_tile(tile, to, stride)
#define HF_TILE_ZERO(tile) ::hf_spqr::emu::zero_tile(tile)
#define HF_TILE_DPBF16PS(sum, x, w) ::hf_spqr::emu::dpbf16ps(sum, x, w)
#define HF_TILE_DPBSUD(sum, x, w) ::hf_spqr::emu::dpbsud(sum, x, w)

namespace hf_spqr {
namespace emu {

struct TileState {
    bool configured = false;
    int rows[8] = {}, bytes[8] = {};
    uint8_t data[8][16][64] = {};
};

inline TileState& tiles() {
    static thread_local TileState state;
    return state;
}

inline void check_tiles(bool ok, const char* what) {
    if (ok) return;
    fprintf(stderr, "amx: %s\n", what);
    abort();
}

inline void configure_tiles(int palette, int start_row, const uint16_t* bytes, const uint8_t* rows) {
    TileState& s = tiles();
    check_tiles(palette == 1 && start_row == 0, "only palette 1 from row 0 on is known");
    memset(s.data, 0, sizeof s.data);
    for (int i = 0; i < 16; ++i) {
        check_tiles(i < 8 || (bytes[i] == 0 && rows[i] == 0), "there are eight tiles");
        check_tiles(bytes[i] <= 64 && rows[i] <= 16 && (bytes[i] == 0) == (rows[i] == 0), "no such tile");
        if (i < 8) s.bytes[i] = bytes[i], s.rows[i] = rows[i];
    }
    s.configured = true;
}

inline void release_tiles() {
    tiles() = TileState();
}

inline TileState& used(int tile) {
    TileState& s = tiles();
    check_tiles(s.configured && tile >= 0 && tile < 8 && s.rows[tile] > 0, "a tile without a configuration");
    return s;
}

inline void load_tile(int tile, const void* from, int64_t stride) {
    TileState& s = used(tile);
    memset(s.data[tile], 0, sizeof s.data[tile]);
    for (int r = 0; r < s.rows[tile]; ++r) {
        memcpy(s.data[tile][r], static_cast<const char*>(from) + r * stride, size_t(s.bytes[tile]));
    }
}

inline void store_tile(int tile, void* to, int64_t stride) {
    const TileState& s = used(tile);
    for (int r = 0; r < s.rows[tile]; ++r) {
        memcpy(static_cast<char*>(to) + r * stride, s.data[tile][r], size_t(s.bytes[tile]));
    }
}

inline void zero_tile(int tile) {
    memset(used(tile).data[tile], 0, sizeof tiles().data[tile]);
}

// The state, if the three tiles fit each other: sum [m, n words], x [m, k words], w [k rows, n words].
inline TileState& fitting(int sum, int x, int w) {
    used(sum), used(x);
    TileState& s = used(w);
    check_tiles(sum != x && sum != w && x != w, "one tile in two roles");
    check_tiles(s.rows[sum] == s.rows[x] && s.bytes[sum] == s.bytes[w] && s.bytes[x] == 4 * s.rows[w],
                "tiles do not fit each other");
    check_tiles(s.bytes[sum] % 4 == 0 && s.bytes[x] % 4 == 0, "half a word in a tile");
    return s;
}

inline float flushed(float v) {
    return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.f, v) : v;
}

inline float bf16_in(const uint8_t* row, int i) {
    uint32_t bits = 0;
    memcpy(reinterpret_cast<char*>(&bits) + 2, row + 2 * i, 2);
    float f;
    memcpy(&f, &bits, 4);
    return flushed(f);
}

// Even and odd columns are summed apart by fused multiply-add, then together, then with what was there; denormals
// count as zero everywhere.
inline void dpbf16ps(int sum, int x, int w) {
    TileState& s = fitting(sum, x, w);
    for (int m = 0; m < s.rows[sum]; ++m) {
        for (int n = 0; n < s.bytes[sum] / 4; ++n) {
            float even = 0.f, odd = 0.f, total;
            for (int k = 0; k < s.rows[w]; ++k) {
                const uint8_t *a = s.data[x][m], *b = s.data[w][k];
                even = flushed(std::fma(bf16_in(a, 2 * k), bf16_in(b, 2 * n), even));
                odd = flushed(std::fma(bf16_in(a, 2 * k + 1), bf16_in(b, 2 * n + 1), odd));
            }
            memcpy(&total, s.data[sum][m] + 4 * n, 4);
            total = flushed(flushed(total) + flushed(even + odd));
            memcpy(s.data[sum][m] + 4 * n, &total, 4);
        }
    }
}

// Signed bytes of x times unsigned bytes of w, added without saturation.
inline void dpbsud(int sum, int x, int w) {
    TileState& s = fitting(sum, x, w);
    for (int m = 0; m < s.rows[sum]; ++m) {
        for (int n = 0; n < s.bytes[sum] / 4; ++n) {
            uint32_t total;
            memcpy(&total, s.data[sum][m] + 4 * n, 4);
            for (int k = 0; k < s.bytes[x]; ++k) {
                total += uint32_t(int(int8_t(s.data[x][m][k])) * int(s.data[w][k / 4][4 * n + k % 4]));
            }
            memcpy(s.data[sum][m] + 4 * n, &total, 4);
        }
    }
}

}  // namespace emu
}  // namespace hf_spqr
