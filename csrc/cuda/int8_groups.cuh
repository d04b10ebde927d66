// Any group size. A warp takes a row block and all its columns, because the reference adds groups from left to right
// in float32.
#pragma once
#include "cuda/int8_group_sums.cuh"

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

// Scales and zero points of a step's groups to shared memory, by a warp.
HF_DEVICE void store_statistics(const Matrix& m, const uint32_t* stream, int step, int lane, uint32_t to) {
    const StatReader<Format::affine> reader(m, stream);
    const int per_step = kStepColumns >> m.panels.group_shift, first = step * per_step;
    const int left = m.panels.groups - first, items = kRows * (per_step < left ? per_step : left);
    for (int i = lane; i < items; i += 32) {
        const ScaleZero s = reader.read(first + i / kRows, i % kRows);
        dev::store_shared(to + 8 * i, make_uint2(dev::as_bits(s.scale), dev::as_bits(s.zero)));
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
    GroupSums<NT> sums(a, first_token, tokens, t);
    float total[NT][4] = {};
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
            const auto close = [&](int first, int columns) {
                const int in_step = (first - step * kStepColumns) >> m.panels.group_shift;
                const uint4 s = dev::load_shared4<0>(statistics + (in_step * kRows + 2 * g) * 8);
                const ScaleZero of[2] = {{dev::as_float(s.x), dev::as_float(s.y)},
                                         {dev::as_float(s.z), dev::as_float(s.w)}};
#pragma unroll
                for (int j = 0; j < NT; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        total[j][e] = dev::add(total[j][e], sums.term(j, e, columns, of[e >> 1]));
                }
            };
            multiply_groups<NT>(sums, operands, m, step * kStepColumns + h * kSetColumns, at + h * kSetColumns, t,
                                close);
        }
        dev::sync_warp();  // the statistics are read before the next ones come
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int64_t row = row_block * kRows + 2 * g + (e >> 1), token = first_token + 8 * j + 2 * t + (e & 1);
            if (row >= m.rows || token >= a.tokens) continue;
            write_output(a, token, row, dev::mul(total[j][e], a.scale[token]));
        }
    }
}

}  // namespace hf_spqr
