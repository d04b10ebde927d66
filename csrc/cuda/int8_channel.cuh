// Few tokens, one scale per row. Warps are WIDTH row blocks x SLICES: warp = slice * WIDTH + which; a slice takes
// every SLICES-th step of 256 columns. All sums are integers, so their order does not matter; the four of
// int8_product.cuh come from the tensor cores, sums of x and of codes from matrices of ones.
#pragma once
#include "cuda/int8_product.cuh"
#include "cuda/int8_x.cuh"

namespace hf_spqr {

template <int NT, int WIDTH, int SLICES>
struct Int8ChannelShape {
    static constexpr int kThreads = 32 * WIDTH * SLICES;
    static constexpr int kTokens = 8 * NT;
    static constexpr int kBlockRows = WIDTH * kRows;
    static constexpr int kBuffer = kTokens * kStepBytes;
    // At the end, of each slice: [token][row] of products, [row] of codes, [token] of x.
    static constexpr int kRowStride = kBlockRows + 4;
    static constexpr int kSlice = kTokens * kRowStride + kBlockRows + kTokens;
    static constexpr int kLoopBytes = 2 * SLICES * kBuffer, kEndBytes = SLICES * kSlice * 4;
    static constexpr int kShared = kLoopBytes > kEndBytes ? kLoopBytes : kEndBytes;
};

template <int NT>
struct Int8Sums {
    int product[NT][4] = {}, w[4] = {}, x[4] = {};
};

// Mma I of a set whose operands are a. x: where the lane's token and tile of the set begin; tokens of tile x_tile are
// summed.
template <int NT, int I>
HF_DEVICE void multiply_pair(Int8Sums<NT>& sums, const uint32_t (&a)[4][4], uint32_t x, uint32_t x_summed) {
    const uint32_t ones[4] = {kOneBytes, kOneBytes, kOneBytes, kOneBytes};
    dev::mma_u8s8(sums.w, a[2 * I], kOneBytes, kOneBytes);
    dev::mma_u8s8(sums.w, a[2 * I + 1], kOneBytes, kOneBytes);
    uint4 b;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        b = dev::load_shared4<16 * I>(x + j * 8 * kStepBytes);
        dev::mma_u8s8(sums.product[j], a[2 * I], b.x, b.y);
        dev::mma_u8s8(sums.product[j], a[2 * I + 1], b.z, b.w);
    }
    if constexpr (NT > 1) b = dev::load_shared4<16 * I>(x + x_summed);
    dev::mma_u8s8(sums.x, ones, b.x, b.y);
    dev::mma_u8s8(sums.x, ones, b.z, b.w);
}

template <int NT, int WIDTH, int SLICES>
HF_DEVICE void finish_channel(const Int8Args& a, const Int8Sums<NT>& sums, int64_t first_token) {
    using Shape = Int8ChannelShape<NT, WIDTH, SLICES>;
    const int lane = dev::thread() & 31, warp = dev::thread() >> 5, g = lane >> 2, t = lane & 3;
    const int which = warp % WIDTH;
    int* all = reinterpret_cast<int*>(dev::shared_memory());
    int* mine = all + warp / WIDTH * Shape::kSlice;
    int* w_sums = mine + Shape::kTokens * Shape::kRowStride;
    const int row = which * kRows + 2 * g;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            mine[(8 * j + 2 * t + (e & 1)) * Shape::kRowStride + row + (e >> 1)] = sums.product[j][e];
    }
    if (t == 0) {
        w_sums[row] = sums.w[0];
        w_sums[row + 1] = sums.w[2];
    }
    if (g == 0) {
        w_sums[Shape::kBlockRows + 8 * which + 2 * t] = sums.x[0];
        w_sums[Shape::kBlockRows + 8 * which + 2 * t + 1] = sums.x[1];
    }
    dev::sync_block();
    for (int i = dev::thread(); i < Shape::kBlockRows * Shape::kTokens; i += Shape::kThreads) {
        const int r = i % Shape::kBlockRows, b = i / Shape::kBlockRows;
        const int64_t to_row = dev::block_x() * Shape::kBlockRows + r, token = first_token + b;
        if (to_row >= a.weight.rows || token >= a.tokens) continue;
        int64_t product = 0, w_sum = 0, x_sum = 0;
        for (int s = 0; s < SLICES; ++s) {
            const int* of = all + s * Shape::kSlice;
            product += of[b * Shape::kRowStride + r];
            w_sum += of[Shape::kTokens * Shape::kRowStride + r];
            x_sum += of[Shape::kTokens * Shape::kRowStride + Shape::kBlockRows + b];
        }
        const StatReader<Format::affine> reader(a.weight, a.weight.packed + to_row / kRows * a.weight.panels.words);
        const ScaleZero w = reader.read(0, int(to_row % kRows));
        const float number = float_product_of(a.weight.columns, product, w_sum, x_sum, int(w.zero), a.zero[token]);
        write_output(a, token, to_row, dev::mul(number, dev::mul(a.scale[token], w.scale)));
    }
}

template <int BITS, int NT, int WIDTH, int SLICES>
HF_KERNEL(32 * WIDTH * SLICES, NT > 2 && BITS > 4 ? 1 : 2)  // as the registers allow
int8_channel_kernel(const Int8Args a) {
    static_assert(NT == WIDTH, "each warp sums a tile of tokens");
    using Shape = Int8ChannelShape<NT, WIDTH, SLICES>;
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), g = lane >> 2, t = lane & 3;
    const int slice = warp / WIDTH, which = warp % WIDTH;
    const int64_t first_token = dev::block_y() * Shape::kTokens;
    const int tokens = int(a.tokens - first_token < Shape::kTokens ? a.tokens - first_token : Shape::kTokens);
    const int steps = (m.panels.tiles + kStepTiles - 1) / kStepTiles;
    const uint32_t x_slice = dev::shared_address() + 2 * slice * Shape::kBuffer;
    const SetWords<BITS> fetcher(m, dev::block_x() * WIDTH + which, lane);
    const CodeFetcher<Shape::kTokens, WIDTH> x(a, first_token, tokens, which, lane, x_slice);
    uint2 words[2][BITS];
    fetcher.fetch(words[0], 2 * slice);
    fetcher.fetch(words[1], 2 * slice + 1);
    x.fetch(0, slice);
    Int8Sums<NT> sums;
    uint32_t buffer = 0;
    // Where warps share x, all go through the loop equally often, because they meet in it.
    const int end = WIDTH > 1 ? (steps + SLICES - 1) / SLICES * SLICES : steps;
    for (int step = slice; step < end; step += SLICES) {
        dev::wait_for_copies();
        if constexpr (WIDTH > 1) {
            dev::sync_block();
        } else {
            dev::sync_warp();
        }
        const int next = step + SLICES;
        const uint32_t at = x_slice + buffer + g * kStepBytes + t * kColumns;
        buffer = Shape::kBuffer - buffer;
        if (next < steps) x.fetch(buffer, next);
        if (WIDTH > 1 && step >= steps) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t operands[4][4];
            set_operands<BITS>(operands, words[h]);
            fetcher.fetch(words[h], 2 * next + h);
            multiply_pair<NT, 0>(sums, operands, at + h * kSetColumns, which * 8 * kStepBytes);
            multiply_pair<NT, 1>(sums, operands, at + h * kSetColumns, which * 8 * kStepBytes);
        }
    }
    dev::wait_for_copies();  // of zeros, by warps whose slice has no step
    dev::sync_block();
    finish_channel<NT, WIDTH, SLICES>(a, sums, first_token);
}

}  // namespace hf_spqr
