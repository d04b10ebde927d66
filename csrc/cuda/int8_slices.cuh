// Few tokens and wide groups, columns split over warps as in int8_channel.cuh. What each group adds to an output goes
// through shared memory, where one thread per output adds it up from left to right, as the reference does.
#pragma once
#include "cuda/int8_group_sums.cuh"

namespace hf_spqr {

template <int NT, int WIDTH, int SLICES>
struct Int8SlicesShape {
    static constexpr int kThreads = 32 * WIDTH * SLICES;
    static constexpr int kTokens = 8 * NT;
    static constexpr int kBlockRows = WIDTH * kRows;
    static constexpr int kOutputs = (kBlockRows * kTokens + kThreads - 1) / kThreads;  // of a thread
    static constexpr int kBuffer = kTokens * kStepBytes;
    // Terms of a group: [token][row].
    static constexpr int kRowStride = kBlockRows + 4, kTermWords = kTokens * kRowStride;
    static HF_CONSTANT int term_bytes(int group) { return SLICES * (kStepColumns / group) * kTermWords * 4; }
    // Statistics of all groups and rows: [group][row], the scale's 16 bits over the zero point.
    static HF_CONSTANT int statistics_bytes(int groups) { return groups * kBlockRows * 4; }
    static HF_CONSTANT int shared(int group, int groups) {
        return 2 * SLICES * kBuffer + term_bytes(group) + statistics_bytes(groups);
    }
};

template <int BITS, int NT, int WIDTH, int SLICES>
HF_KERNEL(32 * WIDTH * SLICES, NT > 2 ? 1 : 2)
int8_slices_kernel(const Int8Args a) {
    using Shape = Int8SlicesShape<NT, WIDTH, SLICES>;
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), g = lane >> 2, t = lane & 3;
    const int slice = warp / WIDTH, which = warp % WIDTH;
    const int64_t first_token = dev::block_y() * Shape::kTokens;
    const int tokens = int(a.tokens - first_token < Shape::kTokens ? a.tokens - first_token : Shape::kTokens);
    const int steps = (m.panels.tiles + kStepTiles - 1) / kStepTiles, per_step = kStepColumns >> m.panels.group_shift;
    const uint32_t x_slice = dev::shared_address() + 2 * slice * Shape::kBuffer;
    float* terms = reinterpret_cast<float*>(dev::shared_memory() + 2 * SLICES * Shape::kBuffer);
    uint32_t* statistics = reinterpret_cast<uint32_t*>(terms) + Shape::term_bytes(m.group) / 4;
    const SetWords<BITS> fetcher(m, dev::block_x() * WIDTH + which, lane);
    const CodeFetcher<Shape::kTokens, WIDTH> x(a, first_token, tokens, which, lane, x_slice);
    uint2 words[2][BITS];
    fetcher.fetch(words[0], 2 * slice);
    fetcher.fetch(words[1], 2 * slice + 1);
    x.fetch(0, slice);
    GroupSums<NT> sums(a, first_token, tokens, t);
    for (int i = dev::thread(); i < m.panels.groups * Shape::kBlockRows; i += Shape::kThreads) {
        const int64_t row = dev::block_x() * Shape::kBlockRows + i % Shape::kBlockRows;
        if (row >= m.rows) continue;
        const StatReader<Format::affine> reader(m, m.packed + row / kRows * m.panels.words);
        statistics[i] = statistics_word(m, reader.read(i / Shape::kBlockRows, int(row % kRows)));
    }
    float total[Shape::kOutputs] = {};
    uint32_t buffer = 0;
    for (int first_step = 0; first_step < steps; first_step += SLICES) {
        const int step = first_step + slice, next = step + SLICES;
        dev::wait_for_copies();
        dev::sync_block();
        const uint32_t at = x_slice + buffer + g * kStepBytes + t * kColumns;
        buffer = Shape::kBuffer - buffer;
        if (next < steps) x.fetch(buffer, next);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (step >= steps) break;
            uint32_t operands[4][4];
            set_operands<BITS>(operands, words[h]);
            fetcher.fetch(words[h], 2 * next + h);
            const auto close = [&](int first, int columns) {
                const int group = first >> m.panels.group_shift, row = which * kRows + 2 * g;
                const uint32_t* s = statistics + group * Shape::kBlockRows + row;
                const ScaleZero of[2] = {statistics_of(m, s[0]), statistics_of(m, s[1])};
                float* to =
                    terms + (group - first_step * per_step) * Shape::kTermWords + 2 * t * Shape::kRowStride + row;
#pragma unroll
                for (int j = 0; j < NT; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        *reinterpret_cast<float2*>(to + (8 * j + e) * Shape::kRowStride) =
                            make_float2(sums.term(j, e, columns, of[0]), sums.term(j, 2 + e, columns, of[1]));
                    }
                }
            };
            multiply_groups<NT>(sums, operands, m, step * kStepColumns + h * kSetColumns, at + h * kSetColumns, t,
                                close);
        }
        dev::sync_block();
        const int left = m.panels.groups - first_step * per_step, most = SLICES * per_step;
        for (int i = 0; i < (left < most ? left : most); ++i) {
#pragma unroll
            for (int o = 0; o < Shape::kOutputs; ++o) {
                const int out = dev::thread() + o * Shape::kThreads, r = out % Shape::kBlockRows;
                if (out >= Shape::kBlockRows * Shape::kTokens) continue;
                total[o] =
                    dev::add(total[o], terms[i * Shape::kTermWords + out / Shape::kBlockRows * Shape::kRowStride + r]);
            }
        }
    }
#pragma unroll
    for (int o = 0; o < Shape::kOutputs; ++o) {
        const int out = dev::thread() + o * Shape::kThreads, b = out / Shape::kBlockRows;
        const int64_t row = dev::block_x() * Shape::kBlockRows + out % Shape::kBlockRows, token = first_token + b;
        if (b >= tokens || row >= m.rows) continue;
        write_output(a, token, row, dev::mul(total[o], a.scale[token]));
    }
}

}  // namespace hf_spqr
