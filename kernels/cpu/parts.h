// What the kernels share: one thread's share of each operation, without any barrier, so that layers.cpp can string
// them together in one parallel region.
#pragma once
#include <immintrin.h>
#include <omp.h>
#include <stddef.h>

#include "clif_cpu.h"

namespace clif {

// The instructions that all kernels may use; only what is compiled behind it, and run at the level that allows it.
#define CLIF_TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"
#define CLIF_TARGET_AMX CLIF_TARGET_AVX512 ",amx-tile,amx-bf16"

// What was written is in memory before what follows. Tile instructions read memory, of which GCC's headers say nothing:
// the compiler would move stores behind them, or leave them out.
inline void publish(const void *written) { __asm__ volatile("" ::"r"(written) : "memory"); }

struct Range {
    int64_t begin, end;
};

// The part of n things that belongs to a thread: contiguous, in whole multiples of `unit` things.
inline Range share(int64_t n, int thread, int threads, int64_t unit = 1) {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t begin = units * thread / threads * unit, end = units * (thread + 1) / threads * unit;
    return {begin < n ? begin : n, end < n ? end : n};
}

// Run part(thread, threads) on so many threads. One thread opens no region: replicas of one thread pay for none.
template <class Part>
void on_threads(int threads, Part part) {
    if (threads <= 1) {
        part(0, 1);
        return;
    }
#pragma omp parallel num_threads(threads)
    part(omp_get_thread_num(), omp_get_num_threads());
}

// Call call(T()) with the type T that `type` names.
template <class Call>
void of_type(int type, Call call) {
    if (type == CLIF_BFLOAT16) {
        call(uint16_t());
    } else {
        call(float());
    }
}

inline float widen(uint16_t x) {
    union {
        uint32_t bits;
        float value;
    } u = {static_cast<uint32_t>(x) << 16};
    return u.value;
}
inline float widen(float x) { return x; }

// To the nearest bfloat16, ties to even; a NaN stays one.
inline uint16_t narrow(float x) {
    union {
        float value;
        uint32_t bits;
    } u = {x};
    if (x != x) return static_cast<uint16_t>(u.bits >> 16 | 0x40);
    return static_cast<uint16_t>((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}

// linear.cpp. The low part must be complete (a barrier) before the rest begins; low: rows of padded_rank numbers.
// Only needed where rank > 0 and slots are given.
inline int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }
void linear_low(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots, uint16_t *low,
                int64_t rows, int level, int thread, int threads);
void linear_rest(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                 const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int level, int thread, int threads);

// y = activation(gates) * ups of a layer gate | up, [rows, out / 2], in place of linear_rest and gated: the same bits, and
// the wide rows are never written. Only where gates_meet: each half of the outputs is a multiple of 16.
bool gates_meet(const clif_linear &linear);
void linear_gated(const clif_linear &linear, int activation, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                  const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int level, int thread, int threads);

// elementwise.cpp
template <class T>
void rms_norm(const T *hidden, const T *added, const clif_norm &norm, T *sum, T *out, int64_t rows, int64_t width,
              int thread, int threads);
// The same of rows in place, so many numbers apart.
template <class T>
void rms_norm_in_place(T *x, int64_t stride, const clif_norm &norm, int64_t rows, int64_t width, int thread, int threads);
template <class T>
void rotate(const clif_heads &heads, T *qkv, const T *angles, const int64_t *positions, T *cache, int64_t cache_slots,
            const int64_t *slots, int64_t rows, int thread, int threads);
template <class T>
void gated(int activation, const T *wide, T *out, int64_t rows, int64_t inner, int thread, int threads);

// attention.cpp
template <class T>
void attention(const clif_heads &heads, const T *query, int64_t query_stride, const T *cache, int64_t cache_slots,
               const clif_rows &rows, const clif_scores &scores, T *out, int thread, int threads);

}  // namespace clif
