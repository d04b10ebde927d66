// Many tokens and groups of 32 columns or more: as int8_many.cuh, with the sums of each group put together in float32
// when it ends. Statistics lie in shared memory, a panel of 32 groups at a time.
#pragma once
#include "cuda/int8_many.cuh"

namespace hf_spqr {

constexpr int kPanelGroups = 32;

template <int MT, int NT, int WM, int WN>
struct Int8ManyGroupsShape : Int8ManyShape<MT, NT, WM, WN> {
    using Base = Int8ManyShape<MT, NT, WM, WN>;
    // Sums of codes, of both buffers: [tile of the set][row], each of the whole group of the tile. Statistics: [group
    // of the panel][row].
    static constexpr int kSumWords = kTilesPerSet * Base::kBlockRows;
    static constexpr int kStatistics = Base::kShared + 2 * kSumWords * 4;
    static constexpr int kShared = kStatistics + kPanelGroups * Base::kBlockRows * 4;
};

// Statistics of a block's rows in the panel of 32 groups that begins with `first`.
template <int ROWS, int THREADS>
HF_DEVICE void store_panel(const Matrix& m, int64_t first_row, int first, uint32_t* to) {
    const int left = m.panels.groups - first, groups = left < kPanelGroups ? left : kPanelGroups;
#pragma unroll 4
    for (int i = dev::thread(); i < groups * ROWS; i += THREADS) {
        const int64_t wanted = first_row + i % ROWS, row = wanted < m.rows ? wanted : m.rows - 1;
        const StatReader<Format::affine> reader(m, m.packed + row / kRows * m.panels.words);
        to[i] = statistics_word(m, reader.read(first + i / ROWS, int(row % kRows)));
    }
}

template <int BITS, int MT, int NT, int WM, int WN, int BLOCKS_PER_SM>
HF_KERNEL(32 * WM * WN, BLOCKS_PER_SM)
int8_many_groups_kernel(const Int8Args a) {
    using Shape = Int8ManyGroupsShape<MT, NT, WM, WN>;
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), g = lane >> 2, t = lane & 3;
    const int warp_m = warp % WM, warp_n = warp / WM;
    const int64_t first_row = dev::block_x() * Shape::kBlockRows, first_token = dev::block_y() * Shape::kTokens;
    const int sets = (m.panels.tiles + kTilesPerSet - 1) / kTilesPerSet;
    const uint32_t shared = dev::shared_address();
    int* code_sums = reinterpret_cast<int*>(dev::shared_memory() + Shape::Base::kShared);
    uint32_t* statistics = reinterpret_cast<uint32_t*>(dev::shared_memory() + Shape::kStatistics);
    Unpacker<BITS, Shape::kItems> unpacker(m, first_row / kRows + warp * Shape::kItems, lane);
    const uint32_t unpack_to = shared + warp * Shape::kItems * kRows * kSetColumns;
    const auto unpack = [&](uint32_t buffer, int set) {
        int sums[Shape::kItems][2] = {};
        unpacker.store(unpack_to + buffer, sums);
        int* to =
            code_sums + (set & 1) * Shape::kSumWords + t * Shape::kBlockRows + warp * Shape::kItems * kRows + 2 * g;
#pragma unroll
        for (int i = 0; i < Shape::kItems; ++i) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int sum = sums[i][r];
                if (m.group >= 2 * kColumns) sum += dev::shuffle_xor(sum, 1);
                if (m.group >= 4 * kColumns) sum += dev::shuffle_xor(sum, 2);
                to[i * kRows + r] = sum;
            }
        }
    };
    const Operands operands(shared + warp_m * MT * kRows * kSetColumns,
                            shared + Shape::kWeightBytes + warp_n * NT * 8 * kSetColumns, lane);
    int x_zero[NT][2];
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int64_t token = first_token + (warp_n * NT + j) * 8 + 2 * t + e;
            x_zero[j][e] = token < a.tokens ? a.zero[token] : 0;
        }
    }
    const uint32_t ones[4] = {kOneBytes, kOneBytes, kOneBytes, kOneBytes};
    const int sets_of_panel = kPanelGroups * m.group / kSetColumns, tiles_of_group = m.group / kColumns;
    int product[MT][NT][4] = {}, x_sums[NT][4] = {};
    float total[MT][NT][4] = {};
    unpacker.fetch(0);
    fetch_set<Shape::kThreads, Shape::kTokens>(a, first_token, 0, shared + Shape::kWeightBytes);
    unpack(0, 0);
    uint32_t buffer = 0;
    for (int set = 0; set < sets; ++set) {
        dev::wait_for_copies();
        dev::sync_block();
        const uint32_t other = Shape::kBuffer - buffer;
        if (set + 1 < sets) {
            fetch_set<Shape::kThreads, Shape::kTokens>(a, first_token, set + 1, shared + other + Shape::kWeightBytes);
            unpacker.fetch(set + 1);
        }
        if (set % sets_of_panel == 0) {
            store_panel<Shape::kBlockRows, Shape::kThreads>(m, first_row, set / sets_of_panel * kPanelGroups,
                                                            statistics);
            dev::sync_block();
        }
#pragma unroll 1
        for (int k = 0; k < kTilesPerSet; ++k) {
            uint32_t x[NT / 2][4], w[4];
#pragma unroll
            for (int j = 0; j < NT / 2; ++j) {
                operands.x(x[j], buffer, j, k);
                dev::mma_u8s8(x_sums[2 * j], ones, x[j][0], x[j][1]);
                dev::mma_u8s8(x_sums[2 * j + 1], ones, x[j][2], x[j][3]);
            }
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                operands.weights(w, buffer, i, k);
#pragma unroll
                for (int j = 0; j < NT; ++j)
                    dev::mma_u8s8(product[i][j], w, x[j / 2][2 * (j % 2)], x[j / 2][2 * (j % 2) + 1]);
            }
            if (k == 2 && set + 1 < sets) unpack(other, set + 1);
            if ((k + 1) % tiles_of_group) continue;
            const int tile = k + 1 - tiles_of_group, first = set * kSetColumns + tile * kColumns;
            const int columns = m.columns - first < m.group ? m.columns - first : m.group;
            if (columns <= 0) continue;
            const int group = first >> m.panels.group_shift;
#pragma unroll
            for (int i = 0; i < MT; ++i) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = (warp_m * MT + i) * kRows + 2 * g + r;
                    const int w_sum = code_sums[(set & 1) * Shape::kSumWords + tile * Shape::kBlockRows + row];
                    const ScaleZero s = statistics_of(m, statistics[group % kPanelGroups * Shape::kBlockRows + row]);
#pragma unroll
                    for (int j = 0; j < NT; ++j) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            int& dot = product[i][j][2 * r + e];
                            const int all = product_of(columns, dot, w_sum, x_sums[j][e], int(s.zero), x_zero[j][e]);
                            float& sum = total[i][j][2 * r + e];
                            sum = dev::add(sum, dev::mul(dev::float_of(all), s.scale));
                            dot = 0;
                        }
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < NT; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) x_sums[j][e] = 0;
            }
        }
        buffer = other;
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int64_t token = first_token + (warp_n * NT + j) * 8 + 2 * t + e;
            if (token >= a.tokens) continue;
            const float scale = a.scale[token];
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                const int64_t row = first_row + (warp_m * MT + i) * kRows + 2 * g;
                if (row >= m.rows) continue;
                float y[2] = {dev::mul(total[i][j][e], scale), dev::mul(total[i][j][2 + e], scale)};
                if (a.bias) {
                    y[0] = dev::add(y[0], read_as(a.bias, row, a.dtype));
                    if (row + 1 < m.rows) y[1] = dev::add(y[1], read_as(a.bias, row + 1, a.dtype));
                }
                write_two(a, token, row, y[0], y[1]);
            }
        }
    }
}

}  // namespace hf_spqr
