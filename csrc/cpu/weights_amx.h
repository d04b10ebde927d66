// Packed row blocks as AMX tiles of bf16: codes as they are, or weights rounded to bf16 with their outliers in place.
// A tile of the format is a tile of AMX: row j has column pair j of 16 rows. Internal linkage (see vec.h).
#pragma once
#include <type_traits>
#include "cpu/codes_bf16.h"
#include "cpu/statistics_avx512.h"
#include "cpu/tokens_amx.h"
#include "cpu/vec.h"
#include "cpu/weights_bf16.h"

namespace hf_spqr {
namespace {

constexpr int kPassBlocks = 8;  // row blocks of a pass over the activations

struct SumScales {  // what a sum of products with codes stands for: scale * (sum - zero * sum of x)
    alignas(64) float scale[kRows], zero[kRows];
};

// Up to kPassBlocks row blocks, kStageTiles tiles at a time.
template <int B, bool Codes>
struct WeightStage {
    const Matrix& m;
    const int64_t first_block, blocks, ahead;
    PanelWalk walk;
    int64_t tile = 0;  // of the panel
    PanelScales statistics[kPassBlocks];
    int32_t next_outlier[kPassBlocks][kRows];
    alignas(64) uint32_t weights[kPassBlocks][kStageTiles][kTileWords];
    SumScales scales[kPassBlocks][kStageTiles];  // [row block][sum of the stage], only for codes

    WeightStage(const Matrix& matrix, int64_t block, int64_t count)
        : m(matrix), first_block(block), blocks(count), ahead(kPassBlocks * matrix.words * 4), walk(matrix, block) {
        for (int64_t r = 0; m.outlier_row && r < blocks; ++r) {
            for (int i = 0; i < rows_of(r); ++i) next_outlier[r][i] = m.outlier_row[(first_block + r) * kRows + i];
        }
    }

    int rows_of(int64_t r) const {
        const int64_t left = m.rows - (first_block + r) * kRows;
        return left < kRows ? int(left) : kRows;
    }

    // The next `count` tiles.
    void unpack(int count) {
        for (int done = 0; done < count;) {
            if (tile == walk.panel.count) next_panel();
            const int64_t left = walk.panel.count - tile;
            const int here = left < count - done ? int(left) : count - done;
            for (int r = 0; r < blocks; ++r) unpack_part(r, done, here);
            tile += here;
            done += here;
        }
    }

  private:
    void next_panel() {
        walk.next();
        tile = 0;
        for (int r = 0; r < blocks; ++r) {
            statistics[r].load(m, walk.panel.statistics + r * m.words, walk.panel.groups);
        }
    }

    void unpack_part(int r, int at, int count) {
        const uint32_t* packed = walk.panel.tiles + r * m.words + tile * B * kRows;
        const PanelScales& s = statistics[r];
        for (int i = 0; i < count; ++i, packed += B * kRows) {
            for (int line = 0; line < B; ++line) {
                __builtin_prefetch(reinterpret_cast<const char*>(packed) + ahead + line * 64, 0, 2);
            }
            char* const out = reinterpret_cast<char*>(weights[r][at + i]);
            const int group = group_of_tile(m, tile + i) * kRows;
            if constexpr (Codes) {
                const int tiles = tiles_of_sum(m);
                to_codes(packed, out, 64);
                if ((at + i) % tiles) continue;
                SumScales& of_sum = scales[r][(at + i) / tiles];
                memcpy(of_sum.scale, s.scale + group, sizeof of_sum.scale);
                memcpy(of_sum.zero, s.zero + group, sizeof of_sum.zero);
            } else {
                values.load(packed);
                pairs_from<B, 0>(values, s.scale + group, s.zero + group, group_shift_in_tile(m), order, out, 64);
            }
        }
        if constexpr (!Codes) {
            if (m.outlier_row) put_outliers(r, at, count);
        }
    }

    void put_outliers(int r, int at, int count) {
        const uint32_t* tiles = walk.panel.tiles + r * m.words + tile * B * kRows;
        uint16_t* const out = reinterpret_cast<uint16_t*>(weights[r][at]);
        const int64_t first = (walk.panel.first_tile + tile) * kColumns;
        const uint64_t width = count * kColumns;
        for (int row = 0; row < rows_of(r); ++row) {
            int32_t& next = next_outlier[r][row];
            for (const int32_t end = m.outlier_row[(first_block + r) * kRows + row + 1]; next < end; ++next) {
                const uint64_t entry = m.outlier ? m.outlier[next] : m.outlier_wide[next];
                const uint64_t column = (m.outlier ? entry & 0xffff : entry & 0xffffffff) - first;
                if (column >= width) break;
                const uint32_t q = code_at<B>(tiles + column / kColumns * B * kRows + row, int(column % kColumns));
                const int group = m.group == kPerChannel ? 0 : int((tile * kColumns + column) / m.group);
                const int of_row = group * kRows + row;
                const float dense = (float(int(q)) - statistics[r].zero[of_row]) * statistics[r].scale[of_row];
                const float value = from_f16(uint16_t(m.outlier ? entry >> 16 : entry >> 32));
                out[(column / 2 * kRows + row) * 2 + column % 2] = to_bf16(dense + value);
            }
        }
    }

    struct Nothing {};
    [[no_unique_address]] std::conditional_t<Codes, CodesBf16<B>, Nothing> to_codes;
    [[no_unique_address]] std::conditional_t<Codes, Nothing, Values<B>> values;
    const __m512i order = pair_order();
};

}  // namespace
}  // namespace hf_spqr
