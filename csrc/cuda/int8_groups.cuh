// Any group size. A warp takes a row block and all its columns, because the reference adds groups from left to right
// in float32. Where a group is narrower than a set of 128 columns, the mma see x of the threads only whose tiles
// belong to it, and the others' as zero.
#pragma once
#include "cuda/int8_product.cuh"
#include "cuda/int8_x.cuh"
#include "cuda/stats_any.cuh"

namespace hf_spqr {

template <int NT, int WIDTH>
struct Int8GroupsShape {
    static constexpr int kThreads = 32 * WIDTH;
    static constexpr int kTokens = 8 * NT;
    static constexpr int kBuffer = kTokens * kStepBytes;
    // Of a warp: scale and zero point of each group and row of a step.
    static HF_CONSTANT int statistics(int group) { return kStepColumns / group * kRows * 8; }
    static HF_CONSTANT int shared(int group) { return 2 * kBuffer + WIDTH * statistics(group); }
};

// A lane's outputs so far, and what it needs for the next group.
template <int NT>
struct GroupSums {
    float total[NT][4] = {};
    int product[NT][4] = {}, x[NT][4] = {}, w[4] = {};
    int x_zero[NT][2];

    // A group of `columns` columns is complete; statistics of the lane's two rows: scale, zero, scale, zero.
    HF_DEVICE void close(int columns, const uint4& s) {
        const float scale[2] = {dev::as_float(s.x), dev::as_float(s.z)};
        const int zero[2] = {int(s.y), int(s.w)};
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int r = e >> 1;
                const int all = product_of(columns, product[j][e], w[2 * r], x[j][e], zero[r], x_zero[j][e & 1]);
                total[j][e] = dev::add(total[j][e], dev::mul(dev::float_of(all), scale[r]));
                product[j][e] = x[j][e] = 0;
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) w[e] = 0;
    }
};

// Scales and zero points of a step's groups to shared memory, by a warp.
HF_DEVICE void store_statistics(const Matrix& m, const uint32_t* stream, int step, int lane, uint32_t to) {
    const StatReader<Format::affine> reader(m, stream);
    const int per_step = kStepColumns >> m.panels.group_shift, first = step * per_step;
    const int left = m.panels.groups - first, items = kRows * (per_step < left ? per_step : left);
    for (int i = lane; i < items; i += 32) {
        const ScaleZero s = reader.read(first + i / kRows, i % kRows);
        dev::store_shared(to + 8 * i, make_uint2(dev::as_bits(s.scale), uint32_t(int(s.zero))));
    }
}

template <int BITS, int NT, int WIDTH>
HF_KERNEL(32 * WIDTH, 2)
int8_groups_kernel(const Int8Args a) {
    using Shape = Int8GroupsShape<NT, WIDTH>;
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, which = dev::uniform(dev::thread() >> 5), g = lane >> 2, t = lane & 3;
    const int64_t first_token = dev::block_y() * Shape::kTokens, row_block = dev::block_x() * WIDTH + which;
    const int tokens = int(a.tokens - first_token < Shape::kTokens ? a.tokens - first_token : Shape::kTokens);
    const int steps = (m.panels.tiles + kStepTiles - 1) / kStepTiles;
    const uint32_t shared = dev::shared_address();
    const uint32_t statistics = shared + 2 * Shape::kBuffer + which * Shape::statistics(m.group);
    const SetWords<BITS> fetcher(m, row_block, lane);
    const CodeFetcher<Shape::kTokens, WIDTH> x(a, first_token, tokens, which, lane, shared);
    uint2 words[2][BITS];
    fetcher.fetch(words[0], 0);
    fetcher.fetch(words[1], 1);
    x.fetch(0, 0);
    GroupSums<NT> sums;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int b = 8 * j + 2 * t + e;
            sums.x_zero[j][e] = a.zero[first_token + (b < tokens ? b : 0)];
        }
    }
    const uint32_t ones[4] = {kOneBytes, kOneBytes, kOneBytes, kOneBytes};
    // Parts of a set that do not share a group, and the number of tiles of each.
    const int parts = m.group >= 128 ? 1 : m.group == 64 ? 2 : 4, per_part = kTilesPerSet / parts;
    const int quarters = m.group >= kColumns ? 4 : m.group / 8;  // of a tile, in a group
    uint32_t buffer = 0;
    for (int step = 0; step < steps; ++step) {
        store_statistics(m, fetcher.stream(), step, lane, statistics);
        dev::wait_for_copies();
        dev::sync_block();
        const uint32_t at = shared + buffer + g * kStepBytes + t * kColumns;
        buffer = Shape::kBuffer - buffer;
        if (step + 1 < steps) x.fetch(buffer, step + 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t operands[4][4];
            set_operands<BITS>(operands, words[h]);
            fetcher.fetch(words[h], 2 * (step + 1) + h);
            for (int part = 0; part < parts; ++part) {
                const bool mine = t / per_part == part;
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    dev::mma_u8s8(sums.w, operands[q], mine ? kOneBytes : 0, mine ? kOneBytes : 0);
#pragma unroll
                    for (int j = 0; j < NT; ++j) {
                        uint2 b = dev::load_shared2<0>(at + h * kSetColumns + j * 8 * kStepBytes + 8 * q);
                        if (!mine) b = make_uint2(0, 0);
                        dev::mma_u8s8(sums.product[j], operands[q], b.x, b.y);
                        dev::mma_u8s8(sums.x[j], ones, b.x, b.y);
                    }
                    if ((q + 1) % quarters) continue;
                    const int last = step * kStepColumns + h * kSetColumns + part * per_part * kColumns +
                                     (parts == 4 ? 8 * (q + 1) : per_part * kColumns);
                    const int first = last - m.group, in_step = (first >> m.panels.group_shift) -
                                                                (step * kStepColumns >> m.panels.group_shift);
                    if (first >= m.columns) continue;
                    sums.close(last < m.columns ? m.group : m.columns - first,
                               dev::load_shared4<0>(statistics + (in_step * kRows + 2 * g) * 8));
                }
            }
        }
        dev::sync_warp();  // the statistics are read before the next ones come
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int64_t row = row_block * kRows + 2 * g + (e >> 1), token = first_token + 8 * j + 2 * t + (e & 1);
            if (row >= m.rows || token >= a.tokens) continue;
            write_output(a, token, row, dev::mul(sums.total[j][e], a.scale[token]));
        }
    }
}

}  // namespace hf_spqr
