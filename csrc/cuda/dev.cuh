// Every device-specific instruction that the kernels use, with two bodies: PTX for nvcc, plain C++ (csrc/emu/emu.h)
// for tests without a GPU. Half-precision pairs travel as uint32_t: low half first.
#pragma once
#include <cstdint>

#ifdef HF_SPQR_EMU
#include "emu/emu.h"
#else
#include <cuda_runtime.h>

#define HF_DEVICE __device__ __forceinline__
#define HF_CONSTANT __host__ __device__ constexpr
#define HF_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace hf_spqr {
namespace dev {

HF_DEVICE int thread() {
    return int(threadIdx.x);
}
HF_DEVICE int64_t block_x() {
    return blockIdx.x;
}
HF_DEVICE int64_t block_y() {
    return blockIdx.y;
}
HF_DEVICE void sync_block() {
    __syncthreads();
}
HF_DEVICE void sync_warp() {
    __syncwarp();
}
// Some of a block's warps, `threads` in all, that name the same `group`, from 1 to 15.
HF_DEVICE void sync_group(int group, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(group), "r"(threads) : "memory");
}
HF_DEVICE int block_threads() {
    return int(blockDim.x);
}
HF_DEVICE int grid_blocks() {
    return int(gridDim.x);
}

// Kernels that overlap in a stream, where the device can: the next one may start when all blocks of this one have said
// so or ended; it waits before it touches what this one may write, and nobody sees a difference.
HF_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
HF_DEVICE void wait_for_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Whether the generation that is compiled for has tensor cores of int4 (8.0 to 8.9); others go through int8.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kInt4Cores = false;
#else
constexpr bool kInt4Cores = true;
#endif

// Asks for the line of 128 bytes to come into the L2 cache; reads nothing.
HF_DEVICE void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// The block's dynamic shared memory, aligned to 1024 bytes.
HF_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char hf_spqr_shared[];
    return hf_spqr_shared;
}

HF_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
HF_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
HF_DEVICE uint32_t hadd2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
// Both halves = one half of a; free, an operand modifier of the half-precision instructions.
HF_DEVICE uint32_t low_twice(uint32_t a) {
    uint32_t r;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(r) : "r"(a));
    return r;
}
HF_DEVICE uint32_t high_twice(uint32_t a) {
    uint32_t r;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(r) : "r"(a));
    return r;
}
HF_DEVICE float low_float(uint32_t a) {
    float r;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(a));
    return r;
}
HF_DEVICE float high_float(uint32_t a) {
    float r;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(a));
    return r;
}
HF_DEVICE uint32_t to_half2(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
HF_DEVICE uint32_t to_bfloat2(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
HF_DEVICE float as_float(uint32_t a) {
    return __uint_as_float(a);
}
HF_DEVICE uint32_t as_bits(float a) {
    return __float_as_uint(a);
}
// a * b + c and a * b, rounded after each operation: the same on every device and in every build.
HF_DEVICE float mul(float a, float b) {
    return __fmul_rn(a, b);
}
HF_DEVICE float add(float a, float b) {
    return __fadd_rn(a, b);
}
HF_DEVICE float fma(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
}

HF_DEVICE float shuffle_xor(float v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
HF_DEVICE int shuffle_xor(int v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
// Of lane `from`.
HF_DEVICE int shuffle(int v, int from) {
    return __shfl_sync(0xffffffffu, v, from);
}
HF_DEVICE float shuffle(float v, int from) {
    return __shfl_sync(0xffffffffu, v, from);
}
// The lanes that say yes, as bits; and how many.
HF_DEVICE uint32_t ballot(bool yes) {
    return __ballot_sync(0xffffffffu, yes);
}
HF_DEVICE int count_bits(uint32_t v) {
    return __popc(v);
}
HF_DEVICE int count(bool yes) {
    return count_bits(ballot(yes));
}
// The largest value of the warp, in every lane.
HF_DEVICE uint32_t max_of_warp(uint32_t v) {
    return __reduce_max_sync(0xffffffffu, v);
}

// c += a b: a 16 x 16 fp16 (row), b 16 x 8 fp16 (column), c fp32.
HF_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b: a 16 x 32 unsigned bytes (row), b 32 x 8 signed bytes (column), c int32 modulo 2^32.
HF_DEVICE void mma_u8s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Codes of half a byte, 64 columns of them; lane's words hold eight each. Native where kInt4Cores says so.
HF_DEVICE void mma_u4s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c + the sum of the four bytes of a.
HF_DEVICE int add_signed_bytes(uint32_t a, int c) {
    return __dp4a(int(a), 0x01010101, c);
}
HF_DEVICE int add_unsigned_bytes(uint32_t a, int c) {
    return int(__dp4a(a, 0x01010101u, uint32_t(c)));
}
// Byte i of the result is byte (i-th hexadecimal digit of SELECT, lowest first) of the eight bytes b:a.
template <uint32_t SELECT>
HF_DEVICE uint32_t select_bytes(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, SELECT);
}
// The bytes of a that `selector` says, a hexadecimal digit for each, lowest first; 4 is a byte of zeros.
HF_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t selector) {
    return __byte_perm(a, 0, selector);
}
// Of floats: a / b, rounded; the nearest integer, ties to even, as float; and the float nearest to an integer.
HF_DEVICE float div(float a, float b) {
    return __fdiv_rn(a, b);
}
HF_DEVICE float round_even(float a) {
    return rintf(a);
}
HF_DEVICE float float_of(int a) {
    return __int2float_rn(a);
}

// A value that is the same in the whole warp, told to the compiler.
HF_DEVICE int uniform(int v) {
    return __shfl_sync(0xffffffffu, v, 0);
}
// A value that the compiler shall keep in a register instead of computing it again.
HF_DEVICE uint32_t keep(uint32_t v) {
    asm("" : "+r"(v));
    return v;
}
// Likewise, of the whole warp and also against ptxas, which computes again what it can: costs an instruction.
HF_DEVICE uint32_t pin(uint32_t v) {
    return __shfl_sync(0xffffffffu, v, threadIdx.x & 31);
}
template <class T>
HF_DEVICE T* keep(T* p) {
    asm("" : "+l"(p));
    return p;
}
// p + TIMES * stride elements, as one instruction: the compiler would keep the multiples of a stride in registers.
template <int TIMES, class T>
HF_DEVICE const T* at_stride(const T* p, int stride) {
    const T* r;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(r) : "r"(stride), "n"(TIMES * int(sizeof(T))), "l"(p));
    return r;
}
// (a & mask) | bits
template <uint32_t MASK>
HF_DEVICE uint32_t mask_or(uint32_t a, uint32_t bits) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "n"(MASK), "r"(bits));
    return r;
}
// (low half of a, low half of b), (high half of a, high half of b)
HF_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x5410);
}
HF_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x7632);
}

// Data that is used once: does not displace what others keep in L1. Not ld.global.nc, which may be moved to before the
// kernel before this one has ended.
HF_DEVICE uint2 load_stream(const uint2* p) {
    uint2 v;
    asm("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
HF_DEVICE uint32_t load_stream(const uint32_t* p) {
    uint32_t v;
    asm("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// Shared memory by 32-bit addresses, for inner loops. Volatile, so that they stay in order among themselves and with
// the barriers.
HF_DEVICE uint32_t shared_address() {
    return uint32_t(__cvta_generic_to_shared(shared_memory()));
}
template <int OFFSET>
HF_DEVICE uint32_t load_shared(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(v) : "r"(at), "n"(OFFSET));
    return v;
}
// 16 bits.
template <int OFFSET>
HF_DEVICE uint32_t load_shared_half(uint32_t at) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1+%2];" : "=h"(v) : "r"(at), "n"(OFFSET));
    return v;
}
template <int OFFSET>
HF_DEVICE uint2 load_shared2(uint32_t at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2+%3];" : "=r"(v.x), "=r"(v.y) : "r"(at), "n"(OFFSET));
    return v;
}
template <int OFFSET>
HF_DEVICE uint4 load_shared4(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4+%5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at), "n"(OFFSET));
    return v;
}
// The low 16 bits of v.
HF_DEVICE void store_shared_half(uint32_t at, uint32_t v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(uint16_t(v)) : "memory");
}
HF_DEVICE void store_shared(uint32_t at, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
HF_DEVICE void store_shared(uint32_t at, uint2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}

HF_DEVICE void store_shared(uint32_t at, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Four matrices of 8 rows x 16 bytes. Lane 8 i + r gives the address of row r of matrix i; lane 4 r + t gets bytes
// 4 t to 4 t + 3 of row r of each.
HF_DEVICE void load_matrices(uint32_t (&m)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at));
}

// If wanted: 16 bytes from global to shared memory, asynchronously; the last 16 - bytes are zeros.
template <int OFFSET>
HF_DEVICE void copy_async(uint32_t to, const void* global, int bytes, bool wanted) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %4, 0; @p cp.async.cg.shared.global [%0+%3], [%1], 16, %2;}" ::"r"(to),
                 "l"(global), "r"(bytes), "n"(OFFSET), "r"(uint32_t(wanted))
                 : "memory");
}
// 16 bytes of what is read once, or zeros.
template <int TO_OFFSET, int FROM_OFFSET>
HF_DEVICE void copy_stream(uint32_t to, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0+%3], [%1+%4], 16, %2;" ::"r"(to), "l"(global),
                 "r"(valid ? 16 : 0), "n"(TO_OFFSET), "n"(FROM_OFFSET)
                 : "memory");
}
// Makes a group of the copies since the last one.
HF_DEVICE void close_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's groups but the last N.
template <int N>
HF_DEVICE void wait_for_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Waits for all copies of this thread.
HF_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace dev
}  // namespace hf_spqr
#endif
