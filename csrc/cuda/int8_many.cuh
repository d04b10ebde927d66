// Many tokens: a block takes 128 rows and 8 * NT * WN tokens, set by set of 128 bytes of columns: 128 columns as
// bytes, 256 as half bytes (int4.cuh). All threads unpack the codes of a set into shared memory, once for all tokens
// of the block; x comes beside it by cp.async, one set ahead; words of the next set are in flight while the tensor
// cores work.
//
// Shared memory: rows of 128 bytes in chunks of 16, chunk c of row r at chunk c ^ key(r), the key being r / 2 for
// weights and r for x, so that neither writing nor ldmatrix collides. A rows of an mma are the row pairs of a row
// block as in int8_x.cuh; columns are in the order of x.
#pragma once
#include "cuda/int8_product.cuh"
#include "cuda/int8_x.cuh"
#include "cuda/operands.cuh"

namespace hf_spqr {

template <int MT, int NT, int WM, int WN>
struct Int8ManyShape {
    static constexpr int kWarps = WM * WN, kThreads = 32 * kWarps;
    static constexpr int kRowBlocks = MT * WM, kBlockRows = kRowBlocks * kRows, kTokens = 8 * NT * WN;
    static constexpr int kItems = kRowBlocks / kWarps;  // row blocks that a warp unpacks
    static constexpr int kWeightBytes = kBlockRows * kOperandBytes, kXBytes = kTokens * kOperandBytes;
    static constexpr int kBuffer = kWeightBytes + kXBytes;
    static constexpr int kShared = 2 * kBuffer;
    static_assert(kRowBlocks % kWarps == 0);
};

// Codes of one row block after the other of a warp, which unpacks them for the whole block.
template <int BITS, int ITEMS>
class Unpacker {
  public:
    HF_DEVICE Unpacker(const Matrix& m, int64_t first_block, int lane) : m_(m), t_(lane & 3), g_(lane >> 2) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            from_[i] = row_block_words(m, first_block + i) + t_ * (BITS * kRows) + 2 * g_;
        }
    }

    HF_DEVICE void fetch(int set) {
        const int tile = set * kTilesPerSet;
        const bool there = tile + t_ < m_.panels.tiles;
        const int offset = there ? tile_offset(m_, tile) : 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
            for (int v = 0; v < BITS; ++v) {
                words_[i][v] = make_uint2(0, 0);
                if (there)
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
                uint32_t w[BITS];
#pragma unroll
                for (int v = 0; v < BITS; ++v) w[v] = r ? words_[i][v].y : words_[i][v].x;
                const uint32_t row = to + (i * kRows + 2 * g_ + r) * kOperandBytes;
                store_half<0>(row, w, sums[i][r]);
                store_half<1>(row, w, sums[i][r]);
            }
        }
    }

  private:
    template <int HALF>
    HF_DEVICE void store_half(uint32_t row, const uint32_t (&w)[BITS], int& sum) const {
        uint32_t u[4];
        sixteen_codes<BITS, HALF>(u, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum = dev::add_unsigned_bytes(u[i], sum);
        dev::store_shared(row + (((2 * t_ + HALF) ^ g_) << 4), uint4{u[0], u[1], u[2], u[3]});
    }

    const Matrix& m_;
    int t_, g_;
    const uint32_t* from_[ITEMS];
    uint2 words_[ITEMS][BITS];
};

// x of a set: tokens that are not there and bytes past the end are zeros.
template <int THREADS, int TOKENS>
HF_DEVICE void fetch_set(const Int8Args& a, int64_t first_token, int set, uint32_t to) {
    constexpr int kStride = THREADS / 8;  // of a thread's tokens: a multiple of 8, so that all have the same key
    const int chunk = dev::thread() & 7, first = dev::thread() >> 3, left = int(a.tokens - first_token) - first;
    const int64_t byte = int64_t(set) * kOperandBytes + 16 * chunk;
    const int8_t* from = a.x + (first_token + first) * a.x_stride + byte;
    to += first * kOperandBytes + ((chunk ^ (first & 7)) << 4);
#pragma unroll
    for (int i = 0; i < TOKENS / kStride; ++i) {
        const bool there = i * kStride < left && byte < a.x_stride;
        dev::copy_async<0>(to + i * kStride * kOperandBytes, from, there ? 16 : 0, true);
        from = dev::keep(from + kStride * a.x_stride);
    }
}

// What the tensor cores multiply.
template <int BITS>
struct WholeBytes {
    static constexpr int kTiles = kTilesPerSet;  // of a set
    static constexpr bool kServed = true;        // by the generation that is compiled for
    template <int ITEMS>
    using Weights = Unpacker<BITS, ITEMS>;

    static HF_DEVICE void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        dev::mma_u8s8(c, a, b0, b1);
    }
    // sum + the codes of x in a word.
    static HF_DEVICE int add(uint32_t x, int sum) { return dev::add_signed_bytes(x, sum); }
};

// Adds token tile 2 i + which of b, two words a lane, to a lane's sum of its token.
template <class Codes>
HF_DEVICE int add_tile(const uint32_t (&b)[4], int which, int sum) {
    sum = Codes::add(which ? b[2] : b[0], sum);
    return Codes::add(which ? b[3] : b[1], sum);
}

// The sum of a quad.
HF_DEVICE int sum_quad(int v) {
    v += dev::shuffle_xor(v, 1);
    return v + dev::shuffle_xor(v, 2);
}

// What the last step needs of a row and of a token, in shared memory.
struct alignas(16) RowEnd {
    int sum, zero;  // the sum with the zero point subtracted
    float scale, bias;
};
struct alignas(16) TokenEnd {
    int sum, zero;
    float scale;
    int unused;
};

HF_DEVICE RowEnd row_end(const Int8Args& a, int64_t row, int sum) {
    const StatReader<Format::affine> reader(a.weight, a.weight.packed + row / kRows * a.weight.panels.words);
    const ScaleZero s = reader.read(0, int(row % kRows));
    const int zero = int(s.zero);
    return {int(uint32_t(sum) - uint32_t(a.weight.columns) * uint32_t(zero)), zero, s.scale,
            a.bias ? read_as(a.bias, row, a.dtype) : -0.f};
}

HF_DEVICE float output_of(int product, const RowEnd& r, const TokenEnd& t) {
    const uint32_t all = uint32_t(product) - uint32_t(r.zero) * uint32_t(t.sum) - uint32_t(t.zero) * uint32_t(r.sum);
    return dev::add(dev::mul(dev::float_of(int(all)), dev::mul(t.scale, r.scale)), r.bias);
}

// y[token, row] and y[token, row + 1], row even, the second one if there is such a row.
HF_DEVICE void write_two(const Int8Args& a, int64_t token, int64_t row, float first, float second) {
    const int64_t at = token * a.weight.rows + row;
    if (a.weight.rows % 2 == 0) {
        if (a.dtype == DType::f32) {
            *reinterpret_cast<float2*>(static_cast<float*>(a.y) + at) = make_float2(first, second);
        } else {
            *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(a.y) + at) =
                a.dtype == DType::bf16 ? dev::to_bfloat2(first, second) : dev::to_half2(first, second);
        }
        return;
    }
    write_as(a.y, at, a.dtype, first);
    if (row + 1 < a.weight.rows) write_as(a.y, at + 1, a.dtype, second);
}

// One scale per row, up to kInt32Columns columns.
template <class Codes, int MT, int NT, int WM, int WN, int BLOCKS_PER_SM>
HF_KERNEL(32 * WM * WN, BLOCKS_PER_SM)
int8_many_kernel(const Int8Args a) {
    static_assert(WM == 2 && NT % 2 == 0, "the two warps of a token tile share its sums of x");
    if constexpr (!Codes::kServed) return;
    using Shape = Int8ManyShape<MT, NT, WM, WN>;
    const Matrix& m = a.weight;
    const int lane = dev::thread() & 31, warp = dev::uniform(dev::thread() >> 5), g = lane >> 2, t = lane & 3;
    const int warp_m = warp % WM, warp_n = warp / WM;
    const int64_t first_row = dev::block_x() * Shape::kBlockRows, first_token = dev::block_y() * Shape::kTokens;
    const int sets = (m.panels.tiles + Codes::kTiles - 1) / Codes::kTiles;
    const uint32_t shared = dev::shared_address();
    typename Codes::template Weights<Shape::kItems> unpacker(m, first_row / kRows + warp * Shape::kItems, lane);
    const uint32_t unpack_to = shared + warp * Shape::kItems * kRows * kOperandBytes;
    const Operands operands(shared + warp_m * MT * kRows * kOperandBytes,
                            shared + Shape::kWeightBytes + warp_n * NT * 8 * kOperandBytes, lane);
    int product[MT][NT][4] = {}, w_sums[Shape::kItems][2] = {}, x_sums[NT / 2] = {};
    unpacker.fetch(0);
    fetch_set<Shape::kThreads, Shape::kTokens>(a, first_token, 0, shared + Shape::kWeightBytes);
    unpacker.store(unpack_to, w_sums);
    uint32_t buffer = 0;
    for (int set = 0; set < sets; ++set) {
        dev::wait_for_copies();
        dev::sync_block();
        const uint32_t other = Shape::kBuffer - buffer;
        if (set + 1 < sets) {
            fetch_set<Shape::kThreads, Shape::kTokens>(a, first_token, set + 1, shared + other + Shape::kWeightBytes);
            unpacker.fetch(set + 1);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t x[NT / 2][4], w[4];
#pragma unroll
            for (int j = 0; j < NT / 2; ++j) {
                operands.x(x[j], buffer, j, k);
                x_sums[j] = add_tile<Codes>(x[j], warp_m, x_sums[j]);
            }
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                operands.weights(w, buffer, i, k);
#pragma unroll
                for (int j = 0; j < NT; ++j)
                    Codes::multiply(product[i][j], w, x[j / 2][2 * (j % 2)], x[j / 2][2 * (j % 2) + 1]);
            }
            if (k == 2 && set + 1 < sets) unpacker.store(unpack_to + other, w_sums);
        }
        buffer = other;
    }
    // What is the same for a row or for a token goes through shared memory.
    dev::sync_block();
    RowEnd* rows = reinterpret_cast<RowEnd*>(dev::shared_memory());
    TokenEnd* tokens = reinterpret_cast<TokenEnd*>(rows + Shape::kBlockRows);
#pragma unroll
    for (int i = 0; i < Shape::kItems; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int sum = sum_quad(w_sums[i][r]), in_block = (warp * Shape::kItems + i) * kRows + 2 * g + r;
            if (t == 0 && first_row + in_block < m.rows) rows[in_block] = row_end(a, first_row + in_block, sum);
        }
    }
#pragma unroll
    for (int j = 0; j < NT / 2; ++j) {
        const int sum = sum_quad(x_sums[j]), in_block = (warp_n * NT + 2 * j + warp_m) * 8 + g;
        const int64_t token = first_token + in_block;
        if (t == 0 && token < a.tokens) tokens[in_block] = {sum, a.zero[token], a.scale[token], 0};
    }
    dev::sync_block();
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int b = (warp_n * NT + j) * 8 + 2 * t + e;
            if (first_token + b >= a.tokens) continue;
            const TokenEnd token = tokens[b];
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                const int r = (warp_m * MT + i) * kRows + 2 * g;
                if (first_row + r >= m.rows) continue;
                write_two(a, first_token + b, first_row + r, output_of(product[i][j][e], rows[r], token),
                          output_of(product[i][j][2 + e], rows[r + 1], token));
            }
        }
    }
}

}  // namespace hf_spqr
