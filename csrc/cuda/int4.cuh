// Weights of 4 bits times activations of up to 4 bits, many tokens, one scale per row: as half bytes, on tensor cores
// that multiply them twice as fast as bytes. Generations 8.0 to 8.9 have them.
//
// A word of a tile holds the codes of 8 columns, the even ones in its low half. x is brought into the same order
// (pack_half_bytes_kernel), so words are operands as they are: nothing is unpacked. A chunk of shared memory is a
// tile's row, a set is 8 tiles.
#pragma once
#include "cuda/int8_many.cuh"

namespace hf_spqr {

constexpr uint32_t kLowHalves = 0x0f0f0f0fu;

// sum + eight codes of half a byte without a sign.
HF_DEVICE int add_half_bytes(uint32_t codes, int sum) {
    return dev::add_unsigned_bytes(codes & kLowHalves, dev::add_unsigned_bytes(codes >> 4 & kLowHalves, sum));
}

// Words of row blocks of a warp, copied for the whole block: those of tiles 2 t and 2 t + 1 of a set by a lane.
template <int ITEMS>
class HalfByteCopier {
  public:
    HF_DEVICE HalfByteCopier(const Matrix& m, int64_t first_block, int lane) : m_(m), t_(lane & 3), g_(lane >> 2) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            from_[i] = row_block_words(m, first_block + i) + 2 * t_ * kTileWords + 2 * g_;
        }
    }

    HF_DEVICE void fetch(int set) {
        const int tile = set * 2 * kTilesPerSet, left = m_.panels.tiles - tile - 2 * t_;
        const int offset = left > 0 ? tile_offset(m_, tile) : 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
            for (int v = 0; v < 8; ++v) {
                words_[i][v] = make_uint2(0, 0);
                if (v / 4 < left)
                    words_[i][v] = dev::load_stream(reinterpret_cast<const uint2*>(from_[i] + offset + v * kRows));
            }
        }
    }

    // To shared memory, the first row block at `to`. sums[item][row] gets the codes added.
    HF_DEVICE void store(uint32_t to, int (&sums)[ITEMS][2]) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t row = to + (i * kRows + 2 * g_ + r) * kOperandBytes;
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    uint32_t w[4];
#pragma unroll
                    for (int v = 0; v < 4; ++v) {
                        w[v] = r ? words_[i][4 * tile + v].y : words_[i][4 * tile + v].x;
                        sums[i][r] = add_half_bytes(w[v], sums[i][r]);
                    }
                    dev::store_shared(row + chunk_place(2 * t_ + tile, g_), uint4{w[0], w[1], w[2], w[3]});
                }
            }
        }
    }

  private:
    static constexpr int kTileWords = 4 * kRows;

    const Matrix& m_;
    int t_, g_;
    const uint32_t* from_[ITEMS];
    uint2 words_[ITEMS][8];
};

struct HalfBytes {
    static constexpr int kTiles = 2 * kTilesPerSet;
    static constexpr bool kServed = dev::kInt4Cores;
    template <int ITEMS>
    using Weights = HalfByteCopier<ITEMS>;

    static HF_DEVICE void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        dev::mma_u4s4(c, a, b0, b1);
    }
    static HF_DEVICE int add(uint32_t x, int sum) { return add_half_bytes(x ^ 0x88888888u, sum) - 8 * 8; }
};

constexpr int kPackThreads = 256;

// Four bytes to half bytes: columns 0 and 2 in the lowest byte, 1 and 3 in the next.
HF_DEVICE uint32_t in_halves(uint32_t bytes) {
    const uint32_t codes = bytes & kLowHalves;
    return codes | codes >> 12;
}

// Grid: x = tokens. A word is eight codes of x in the order of the weights' words.
static HF_KERNEL(kPackThreads, 1) pack_half_bytes_kernel(const PadArgs a) {
    const int64_t token = dev::block_x();
    const int8_t* x = a.x + token * a.columns;
    uint32_t* out = reinterpret_cast<uint32_t*>(a.out + token * a.stride);
    const bool vectors = a.columns % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 8 == 0;
    for (int i = dev::thread(); i < a.stride / 4; i += kPackThreads) {
        uint2 bytes = make_uint2(0, 0);
        const int left = a.columns - 8 * i;
        if (vectors) {
            if (left > 0) bytes = *reinterpret_cast<const uint2*>(x + 8 * i);
        } else {
            for (int c = 0; c < 8 && c < left; ++c) {
                const uint32_t code = uint8_t(x[8 * i + c]);
                (c < 4 ? bytes.x : bytes.y) |= code << 8 * (c % 4);
            }
        }
        out[i] = dev::select_bytes<0x5140>(in_halves(bytes.x), in_halves(bytes.y));
    }
}

}  // namespace hf_spqr
