// A warp's row blocks: their statistics, and the words of a step of 256 columns on their way to registers.
#pragma once
#include <utility>
#include "cuda/matrix.h"
#include "cuda/tile.cuh"

namespace hf_spqr {

// Words of the two sets of a step, two rows at a time. Past the last tile the old words stay: their x is zero.
template <class Stats, int BITS>
class WordFetcher {
  public:
    HF_DEVICE WordFetcher(const Matrix& m, const uint32_t* stream, int lane) : m_(m) {
        from_ = dev::keep(stream + 2 * (lane >> 2));
        tile_words_ = (lane & 3) * (BITS * kRows);
        left_ = m.panels.tiles - (lane & 3);
    }

    // Of both sets of a step, one after the other.
    template <int H>
    HF_DEVICE void fetch(int step) {
        // They lie in one panel, unless panels are short.
        constexpr bool same = Stats::kTileShift >= 3;
        const int tile = step * kStepTiles + H * kTilesPerSet;
        if (H == 0 || !same) at_ = place(tile);
        load<H>(tile, at_ + (same ? H * kTilesPerSet * BITS * kRows : 0));
    }

    // Of one set only; nothing is kept in registers from one to the other.
    template <int H>
    HF_DEVICE void fetch_set(int step) {
        const int tile = step * kStepTiles + H * kTilesPerSet;
        load<H>(tile, place(tile));
    }

    // The words of set H, row by row.
    template <int H>
    HF_DEVICE void split(uint32_t (&w)[2][BITS]) const {
#pragma unroll
        for (int v = 0; v < BITS; ++v) {
            w[0][v] = words_[H][v].x;
            w[1][v] = words_[H][v].y;
        }
    }

  private:
    // Of a tile that begins a set: the lane's words.
    HF_DEVICE const uint32_t* place(int tile) const { return dev::keep(from_ + (offset(tile) + tile_words_)); }

    template <int H>
    HF_DEVICE void load(int tile, const uint32_t* at) {
        if (tile >= left_) return;
#pragma unroll
        for (int v = 0; v < BITS; ++v) {
            words_[H][v] = dev::load_stream(reinterpret_cast<const uint2*>(at + v * kRows));
        }
    }

    HF_DEVICE int offset(int tile) const {
        const int tile_shift = Stats::kTileShift < 0 ? m_.panels.tile_shift : Stats::kTileShift;
        const int panel = tile >> tile_shift;
        const int stats = panel == m_.panels.last_panel ? m_.panels.last_stat_words : m_.panels.stat_words;
        return panel * m_.panels.panel_words + stats + (tile - (panel << tile_shift)) * (BITS * kRows);
    }

    const Matrix& m_;
    const uint32_t* from_;
    const uint32_t* at_ = nullptr;
    int tile_words_, left_;
    uint2 words_[2][BITS] = {};
};

template <class Stats, int BITS>
struct RowBlock {
    Stats stats;
    WordFetcher<Stats, BITS> words;

    HF_DEVICE RowBlock(const Matrix& m, int64_t wanted, int lane, int first_step, int stride, uint32_t shared)
        : RowBlock(m, row_block_words(m, wanted), lane, first_step, stride, shared) {}

    // All that the step needs from memory.
    HF_DEVICE void fetch(int step) {
        stats.prefetch(step);
        words.template fetch<0>(step);
        words.template fetch<1>(step);
    }

  private:
    HF_DEVICE RowBlock(const Matrix& m, const uint32_t* stream, int lane, int first_step, int stride, uint32_t shared)
        : stats(m, stream, lane, first_step, stride, shared), words(m, stream, lane) {}
};

template <class Stats, int BITS, int R>
struct RowBlocks {
    RowBlock<Stats, BITS> each[R];

    template <int... I>
    HF_DEVICE RowBlocks(std::integer_sequence<int, I...>, const Matrix& m, int64_t wanted, int lane, int first_step,
                        int stride, uint32_t shared, int stat_bytes)
        : each{RowBlock<Stats, BITS>(m, wanted + I, lane, first_step, stride, shared + I * stat_bytes)...} {}
};

}  // namespace hf_spqr
