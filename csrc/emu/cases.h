// Cases that tests write to a file for a program of kernels: PROGRAM IN OUT.
//
// IN: for each case 18 int64 (see Header), then its tensors, each as its size in bytes (int64) and the bytes; an empty
// tensor stands for a missing one. OUT: the result of each case, likewise. Every tensor has an allocation of its own,
// so that AddressSanitizer guards both its ends.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace hf_spqr {
namespace {

struct Header {
    int64_t job, format, bits, group, rows, columns, stat_bits, groups_per_second, symmetric, scale_bf16, tokens,
        dtype, first_row, part_rows, wide, seed, multiprocessors, shared_bytes;
};

struct Bytes {
    void* data = nullptr;
    int64_t size = 0;

    explicit Bytes(int64_t n) : size(n) {
        if (n > 0 && posix_memalign(&data, 256, size_t(n))) abort();
    }
    Bytes(const Bytes&) = delete;
    ~Bytes() { free(data); }
    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

void expect(bool ok, const char* what) {
    if (ok) return;
    fprintf(stderr, "emu: %s\n", what);
    exit(2);
}

std::unique_ptr<Bytes> read_tensor(FILE* in) {
    int64_t size = 0;
    expect(fread(&size, sizeof size, 1, in) == 1, "input ends early");
    auto bytes = std::make_unique<Bytes>(size);
    expect(size == 0 || fread(bytes->data, size_t(size), 1, in) == 1, "input ends early");
    return bytes;
}

void write_result(const Bytes& result, FILE* out) {
    fwrite(&result.size, sizeof result.size, 1, out);
    fwrite(result.data, 1, size_t(result.size), out);
}

// main: run(header, in, out) for each case.
template <class Run>
int run_cases(int argc, char** argv, const Run& run) {
    expect(argc == 3, "usage: PROGRAM IN OUT");
    FILE* in = fopen(argv[1], "rb");
    FILE* out = fopen(argv[2], "wb");
    expect(in && out, "cannot open the files");
    Header header;
    while (fread(&header, sizeof header, 1, in) == 1) run(header, in, out);
    fclose(in);
    return fclose(out);
}

}  // namespace
}  // namespace hf_spqr
