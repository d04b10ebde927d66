// Products of integers for every affine matrix and any number of tokens. A chunk of several row blocks is unpacked
// once for up to kTokens tokens. What differs between instruction sets is in the engine E:
//   Element          a code of an activation
//   kTileBytes       of an unpacked tile, kSteps: of the tile; a step takes one 32-bit word of activations
//   kBlocks          row blocks at once, kTogether: tokens at once
//   unpack_bits<B, R>(codes, tiles, w)    tiles of B bits to w, their steps R * 64 bytes apart
//   accumulate<R, T>(w, steps, x, x_stride, sum, ahead)    sum[T][R * 16] += products, x in elements
//   kTokenTiles      whether activations lie in tiles of 16 tokens x 64 columns and, but for the sums of weights,
//                    multiply<R>(w, steps, x, x_block, tokens, sum, ahead, bits) takes the place of accumulate
//   kArranged        whether tiles are unpacked to offset(bits) less than their codes, the columns of a tile in
//   another
//                    order: byte i is column(bits, i). Activations are then brought into that order, too
//   kFew             tokens up to which whole tiles are multiplied straight from the packed codes, by
//                    few<R>(tokens, bits, codes, words, tiles, x, x_stride, one, sum, weights), kFewBlocks at once
// Everything is compiled without fused multiply-add: the results are those of the reference to the last bit. Internal
// linkage (see vec.h).
#pragma once
#include "cpu/integer.h"
#include "cpu/quantize.h"
#include "cpu/round.h"
#include "cpu/tile.h"

namespace hf_spqr {
namespace {

constexpr int kChunkTiles = 16;      // unpacked at a time
constexpr int kTokens = 256;         // that share an unpacked chunk
constexpr int kTokenTile = 16;       // tokens of a tile of activations
constexpr int64_t kStretch = 32768;  // columns whose products, of two numbers of 8 bits and a sign, int32 adds up

// Columns that share a sum in int32.
inline int64_t columns_of_sum(const Matrix& m) {
    return m.group == kPerChannel ? kStretch : m.group;
}

// Beside the codes: where the engine cannot read them as they are, the codes as elements, zero padded to whole tiles
// (with kTokenTiles in whole tiles of tokens, too: [token / 16][column / 64][token][column]), and
// [token][sum] sum(code) - n zero of the n columns of a sum.
template <class E>
struct Prepared {
    using Element = typename E::Element;
    const IntegerArgs& a;
    int64_t sums, padded, padded_tokens;
    bool copied;

    explicit Prepared(const IntegerArgs& args) : a(args) {
        const Matrix& m = a.weight;
        sums = ceil_div(m.columns, columns_of_sum(m));
        const int width = E::kTokenTiles ? 2 * kColumns : kColumns;
        padded = ceil_div(m.columns, width) * width;
        padded_tokens = E::kTokenTiles ? ceil_div(args.tokens, kTokenTile) * kTokenTile : args.tokens;
        copied = E::kTokenTiles || E::kArranged || sizeof(Element) > 1 || padded != m.columns;
    }
    int64_t copy_bytes() const { return copied ? padded_tokens * padded * int64_t(sizeof(Element)) : 0; }
    int64_t bytes() const { return copy_bytes() + a.tokens * sums * 4; }
    int32_t* rest(int64_t token) const { return reinterpret_cast<int32_t*>(a.prepared + copy_bytes()) + token * sums; }
    Element* copy(int64_t token) const { return reinterpret_cast<Element*>(a.prepared) + token * padded; }
    const Element* x(int64_t token) const {
        return copied ? copy(token) : reinterpret_cast<const Element*>(a.code) + token * padded;
    }
    // With kTokenTiles: columns from `column` on of the 16 tokens from `token` on, 64 bytes from token to token.
    const Element* tile(int64_t token, int64_t column) const {
        return copy(token) + column / 64 * 64 * kTokenTile + column % 64;
    }
    // Copies token `t`, and zeros behind the last.
    void copy_to_tiles(int64_t t, const int8_t* code) const {
        for (int64_t end = t + 1 < a.tokens ? t + 1 : padded_tokens, row = t; row < end; ++row) {
            Element* x = copy(row / kTokenTile * kTokenTile) + row % kTokenTile * 64;
            for (int64_t k = 0; k < padded; k += 64, x += 64 * kTokenTile) {
                const int64_t left = row > t ? 0 : a.weight.columns - k, here = left < 64 ? left : 64;
                memcpy(x, code + k, here);
                memset(x + here, 0, 64 - here);
            }
        }
    }
};

template <class E>
int64_t prepared_bytes(const Matrix& m, int64_t tokens) {
    return Prepared<E>({m, nullptr, nullptr, nullptr, tokens}).bytes();
}

// x[i] = value(column in place i), zero from `columns` on.
template <class E, class Value>
void arrange(int bits, int64_t columns, int64_t padded, typename E::Element* x, const Value& value) {
    int order[kColumns];
    for (int i = 0; i < kColumns; ++i) order[i] = E::column(bits, i);
    for (int64_t first = 0; first < padded; first += kColumns) {
        for (int i = 0; i < kColumns; ++i) {
            const int64_t k = first + order[i];
            x[first + i] = k < columns ? value(k) : 0;
        }
    }
}

template <class E>
void prepare_integers(const IntegerArgs& a, int64_t first, int64_t last) {
    const Prepared<E> p(a);
    const int64_t columns = a.weight.columns, width = columns_of_sum(a.weight);
    for (int64_t t = first; t < last; ++t) {
        const int8_t* code = a.code + t * columns;
        for (int64_t s = 0; s < p.sums; ++s) {
            const int64_t begin = s * width, end = begin + width < columns ? begin + width : columns;
            int32_t sum = 0;
            for (int64_t k = begin; k < end; ++k) sum += code[k];
            p.rest(t)[s] = int32_t(uint32_t(sum) - uint32_t(end - begin) * uint32_t(a.zero[t]));
        }
        if constexpr (E::kTokenTiles) {
            p.copy_to_tiles(t, code);
        } else if constexpr (E::kArranged) {
            arrange<E>(a.weight.bits, columns, p.padded, p.copy(t), [&](int64_t k) { return code[k]; });
        } else if (p.copied) {
            typename E::Element* x = p.copy(t);
            for (int64_t k = 0; k < columns; ++k) x[k] = code[k];
            for (int64_t k = columns; k < p.padded; ++k) x[k] = 0;
        }
    }
}

// Memory to fetch with each step.
struct Ahead {
    const char* next;
    int step;

    void fetch() {
        __builtin_prefetch(next, 0, 2);
        next += step;
    }
};

template <class E, int R>
void unpack(int bits, const uint32_t* codes, int tiles, char* w) {
    constexpr decltype(&E::template unpack_bits<8, R>) kTable[8] = {
        E::template unpack_bits<1, R>, E::template unpack_bits<2, R>, E::template unpack_bits<3, R>,
        E::template unpack_bits<4, R>, E::template unpack_bits<5, R>, E::template unpack_bits<6, R>,
        E::template unpack_bits<7, R>, E::template unpack_bits<8, R>};
    kTable[bits - 1](codes, tiles, w);
}

// R row blocks, up to kTokens tokens from `token` on.
template <class E, int R>
struct RowBlocks {
    using Element = typename E::Element;
    static constexpr int kWidth = R * kRows, kStepColumns = kColumns / E::kSteps;
    const IntegerArgs& a;
    const Prepared<E>& p;
    int64_t block, token;
    int tokens;
    bool wide;             // several stretches, whose total is beyond int32
    int64_t chunk_first;   // column
    const char* ahead[R];  // what is unpacked next

    alignas(64) char w[kChunkTiles * E::kTileBytes * R];
    alignas(64) int32_t sum[(kTokens + 1) * kWidth];  // last: of ones, which gives the sums of the weights' codes
    union {
        alignas(64) float total[kTokens * kWidth];
        int64_t wide_total[kTokens / 2 * kWidth];
    };
    alignas(64) float scale[kMaxGroups * kWidth];  // of the panel, [group][row]
    alignas(64) int32_t zero[kMaxGroups * kWidth];
    alignas(64) Element ones[kChunkTiles * kColumns];

    RowBlocks(const IntegerArgs& args, const Prepared<E>& prepared) : a(args), p(prepared) {
        wide = a.weight.group == kPerChannel && p.sums > 1;
    }
    int most_tokens() const { return wide ? kTokens / 2 : kTokens; }

    void load_statistics(const Panel& panel) {
        const Matrix& m = a.weight;
        const DecodeStatistics decode = decode_statistics_of<1>(m.bits);
        alignas(64) float s[kMaxGroups * kRows], z[kMaxGroups * kRows];
        for (int r = 0; r < R; ++r) {
            Panel own = panel;
            own.statistics += r * m.words;
            load_affine(m, own, decode, s, z);
            for (int g = 0; g < panel.groups; ++g) {
                for (int i = 0; i < kRows; ++i) {
                    scale[g * kWidth + r * kRows + i] = s[g * kRows + i];
                    zero[g * kWidth + r * kRows + i] = int32_t(z[g * kRows + i]);
                    if constexpr (E::kArranged) zero[g * kWidth + r * kRows + i] -= E::offset(m.bits);
                }
            }
        }
    }

    // Adds the products of the columns from `at` of the chunk on to the sums. Meanwhile what is unpacked next comes
    // nearer: one row block's with each of the first parts, because products leave the memory idle.
    void multiply(int64_t at, int steps) {
        const char* tiles = w + at / kStepColumns * R * 64;
        E::template accumulate<R, 1>(tiles, steps, ones + at, 0, sum + kTokens * kWidth, Ahead{tiles, 0});
        if constexpr (E::kTokenTiles) {
            const char* next[R];
            for (int r = 0; r < R; ++r) next[r] = ahead[r] + 2 * a.weight.bits * at;
            E::template multiply<R>(tiles, steps, p.tile(token, chunk_first + at), kTokenTile * p.padded, tokens, sum,
                                    next, a.weight.bits);
        } else {
            multiply_tokens(tiles, at, steps);
        }
    }

    void multiply_tokens(const char* tiles, int64_t at, int steps) {
        const Element* x = p.x(token) + chunk_first + at;
        const int needed = (tokens + E::kTogether - 1) / E::kTogether, least = tokens < R ? tokens : R;
        const int parts = needed > least ? needed : least, ahead_step = 2 * a.weight.bits * kStepColumns;
        for (int part = 0, t = 0; part < parts; ++part) {
            const int next = tokens * (part + 1) / parts;
            const Ahead fetch = part < R ? Ahead{ahead[part] + 2 * a.weight.bits * at, ahead_step} : Ahead{tiles, 0};
            accumulate<E::kTogether>(next - t, tiles, steps, x + t * p.padded, sum + t * kWidth, fetch);
            t = next;
        }
    }

    template <int T>
    void accumulate(int count, const char* tiles, int steps, const Element* x, int32_t* to, Ahead fetch) {
        if constexpr (T > 1) {
            if (count < T) return accumulate<T - 1>(count, tiles, steps, x, to, fetch);
        }
        E::template accumulate<R, T>(tiles, steps, x, p.padded, to, fetch);
    }

    // Ends sum `index`, whose statistics are those of `group` of the panel, and begins the next.
    void finish(int64_t index, int group) {
        const bool grouped = a.weight.group != kPerChannel;
        int32_t* weights = sum + kTokens * kWidth;
        for (int t = 0; t < tokens; ++t) {
            const int32_t z = a.zero[token + t], rest = p.rest(token + t)[index];
            for (int i = 0; i < kWidth; i += kLanes) {
                const VecI n = exact(sum + t * kWidth + i, weights + i, zero + group * kWidth + i, z, rest);
                float* to = total + t * kWidth + i;
                if (grouped) {
                    store(to, load(to) + __builtin_convertvector(n, VecF) * load(scale + group * kWidth + i));
                } else if (wide) {
                    for (int k = 0; k < kLanes; ++k) wide_total[t * kWidth + i + k] += n[k];
                } else {
                    store(to, __builtin_convertvector(n, VecF));
                }
            }
        }
        memset(sum, 0, sizeof(int32_t) * tokens * kWidth);
        memset(weights, 0, sizeof(int32_t) * kWidth);
    }

    // products - z sum of the weights' codes - zero (sum of the activations' codes - n z)
    static VecI exact(const int32_t* products, const int32_t* weights, const int32_t* zero, int32_t z, int32_t rest) {
        VecU n, w, zeros;  // unsigned: the parts may go round, what they add up to does not
        memcpy(&n, products, sizeof n);
        memcpy(&w, weights, sizeof w);
        memcpy(&zeros, zero, sizeof zeros);
        return (VecI)(n - w * uint32_t(z) - zeros * uint32_t(rest));
    }

    void run(int64_t first_block, int64_t first_token, int count) {
        const Matrix& m = a.weight;
        block = first_block, token = first_token, tokens = count;
        memset(sum, 0, sizeof(int32_t) * tokens * kWidth);
        memset(sum + kTokens * kWidth, 0, sizeof(int32_t) * kWidth);
        memset(total, 0, sizeof(float) * tokens * kWidth * (wide ? 2 : 1));
        for (auto& one : ones) one = 1;
        int64_t index = 0;
        for (PanelWalk walk(m, block); walk.next();) {
            load_statistics(walk.panel);
            int group = 0;
            for (int64_t tile = 0; tile < walk.panel.count; tile += kChunkTiles) {
                const int64_t left = walk.panel.count - tile;
                chunk(walk.panel, tile, left < kChunkTiles ? int(left) : kChunkTiles, index, group);
            }
        }
        finish_rows();
    }

    void chunk(const Panel& panel, int64_t tile, int tiles, int64_t& index, int& group) {
        const Matrix& m = a.weight;
        const uint32_t* codes = panel.tiles + tile * m.bits * kRows;
        const int64_t first = (panel.first_tile + tile) * kColumns, end = first + tiles * kColumns;
        if constexpr (E::kArranged) {
            if (end > m.columns) arrange<E>(m.bits, m.columns - first, end - first, ones, [](int64_t) { return 1; });
        } else {
            for (int64_t k = m.columns; k < end; ++k) ones[k - first] = 0;
        }
        if constexpr (R <= E::kFewBlocks) {
            const bool whole_tiles = m.group == kPerChannel || m.group >= kColumns;
            if (tokens <= E::kFew && whole_tiles) return few_tokens(codes, first, tiles, index, group);
        }
        const int64_t size = int64_t(tiles) * m.bits * kRows;
        for (int r = 0; r < R; ++r) {
            const uint32_t* own = codes + r * m.words;
            unpack<E, R>(m.bits, own, tiles, w + r * 64);
            ahead[r] =
                reinterpret_cast<const char*>(end < m.columns ? own + size : m.packed + (block + R + r) * m.words);
        }
        chunk_first = first;
        if (m.group == kPerChannel) {
            multiply(0, tiles * E::kSteps);
            if (end % kStretch == 0 || end >= m.columns) finish(index++, 0);
            return;
        }
        for (int64_t k = first; k < end && k < m.columns; k += m.group) {
            const int columns = end - k < m.group ? int(end - k) : m.group;
            multiply(k - first, columns / kStepColumns);
            finish(index++, group++);
        }
    }

    void few_tokens(const uint32_t* codes, int64_t first, int tiles, int64_t& index, int& group) {
        const Matrix& m = a.weight;
        const int step = m.group == kPerChannel ? tiles : m.group / kColumns;
        for (int tile = 0; tile < tiles; tile += step) {
            const int here = tiles - tile < step ? tiles - tile : step;
            const int64_t at = tile * kColumns;
            E::template few<R>(tokens, m.bits, codes + tile * m.bits * kRows, m.words, here, p.x(token) + first + at,
                               p.padded, ones + at, sum, sum + kTokens * kWidth);
            if (m.group != kPerChannel) {
                finish(index++, group++);
            } else if ((first + tiles * kColumns) % kStretch == 0 || first + tiles * kColumns >= m.columns) {
                finish(index++, 0);
            }
        }
    }

    void finish_rows() {
        const Matrix& m = a.weight;
        const int64_t row = block * kRows;
        const int rows = m.rows - row < kWidth ? int(m.rows - row) : kWidth;
        alignas(64) float bias[kWidth] = {}, y[kWidth];
        if (a.bias) {
            for (int r = 0; r < rows; ++r) bias[r] = load_one(a.bias, row + r, a.dtype);
        }
        for (int t = 0; t < tokens; ++t) {
            const VecF s = splat(a.scale[token + t]);
            const float* from = total + t * kWidth;
            if (wide) {
                for (int r = 0; r < kWidth; ++r) y[r] = float(wide_total[t * kWidth + r]);
                from = y;
            }
            for (int i = 0; i < kWidth; i += kLanes) {
                VecF v = load(from + i) * (m.group == kPerChannel ? s * load(scale + i) : s);
                if (a.bias) v += load(bias + i);
                store(y + i, v);
            }
            store_rows(y, (token + t) * m.rows + row, rows);
        }
    }

    void store_rows(const float* y, int64_t at, int rows) {
        if (rows < kWidth) {
            for (int r = 0; r < rows; ++r) store_one(a.y, at + r, y[r], a.dtype);
        } else if (a.dtype == DType::f32) {
            memcpy(static_cast<float*>(a.y) + at, y, kWidth * sizeof(float));
        } else {
            uint16_t* to = static_cast<uint16_t*>(a.y) + at;
            for (int i = 0; i < kWidth; i += kLanes) {
                const VecF v = load(y + i);
                const VecH h = __builtin_convertvector(a.dtype == DType::bf16 ? bf16_bits(v) : f16_bits(v), VecH);
                memcpy(to + i, &h, sizeof h);
            }
        }
    }
};

template <class E, int R>
int64_t row_blocks(const IntegerArgs& a, const Prepared<E>& p, int64_t block, int64_t last) {
    if (block + R > last) return block;
    RowBlocks<E, R> rows(a, p);
    const int64_t step = rows.most_tokens();
    const int64_t end = block + (last - block) / R * R;
    for (int64_t token = 0; token < a.tokens; token += step) {
        const int count = int(a.tokens - token < step ? a.tokens - token : step);
        for (int64_t b = block; b < end; b += R) rows.run(b, token, count);
    }
    return end;
}

template <class E>
void integer_linear(const IntegerArgs& a, int64_t first, int64_t last) {
    const Prepared<E> p(a);
    if constexpr (E::kBlocks >= 4) {
        if (a.tokens > E::kFew) first = row_blocks<E, 4>(a, p, first, last);
    }
    if constexpr (E::kBlocks >= 2) first = row_blocks<E, 2>(a, p, first, last);
    row_blocks<E, 1>(a, p, first, last);
}

template <class E>
constexpr IntegerKernels integer_kernels_of() {
    return {quantize, prepared_bytes<E>, prepare_integers<E>, integer_linear<E>};
}

}  // namespace
}  // namespace hf_spqr
