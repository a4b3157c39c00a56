// Products of bfloat16 matrices with sums in float32, whose right side is packed into panels on the spot.
//
// A panel holds 16 columns of a matrix B [k, n] as [k / 32][16 pairs of rows][16 columns][2]; panels of further columns
// follow. Whole tiles are computed: rows of A and columns of B are padded to 16, k to 32.
#pragma once
#include "parts.h"
#include "vector.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16")

namespace clif::training {

inline int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }

// AMX's tiles, all of 16 rows of 64 bytes: configured once for a thread's share, and released behind it.
class Tiles {
   public:
    explicit Tiles(int level) : amx(level == CLIF_AMX) {
        if (!amx) return;
        alignas(64) uint8_t configuration[64] = {1};
        for (int tile = 0; tile < 8; tile++) configuration[16 + 2 * tile] = 64, configuration[48 + tile] = 16;
        publish(configuration);
        _tile_loadconfig(configuration);
    }
    ~Tiles() {
        if (amx) _tile_release();
    }
    Tiles(const Tiles &) = delete;

    const bool amx;
};

// 16 rows of 16 dwords -> their transpose.
inline void transpose16(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// 32 numbers times scale, rounded once.
inline __m512i scaled(__m512i numbers, float scale) {
    alignas(64) uint16_t from[32];
    _mm512_store_si512(from, numbers);
    const __m512 low = _mm512_mul_ps(load(from), splat(scale)), high = _mm512_mul_ps(load(from + 16), splat(scale));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// So many of 32 lanes.
inline __mmask32 lanes32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

// Two rows of 32 bfloat16 numbers -> their pairs, of columns 0 to 15 and 16 to 31.
inline void interleave(__m512i even, __m512i odd, __m512i *first, __m512i *second) {
    alignas(64) static const uint16_t at[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    *first = _mm512_permutex2var_epi16(even, _mm512_load_si512(at), odd);
    *second = _mm512_permutex2var_epi16(even, _mm512_load_si512(at + 32), odd);
}

// Two rows of 16 float32 numbers -> their pairs, rounded to bfloat16.
inline __m512i round_pairs(__m512 even, __m512 odd) {
    alignas(64) static const uint16_t at[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(at), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// 32 float32 numbers as bfloat16.
inline __m512i round32(const float *from) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
}

// Panels of B [k, n], whose rows lie row_stride numbers apart; zeros behind k and n.
inline void pack_rows(const uint16_t *b, int64_t row_stride, int64_t k, int64_t n, uint16_t *panels) {
    const int64_t deep = padded(k), panel = deep * 16;
    for (int64_t col = 0; col < n; col += 32) {
        const __mmask32 lanes = lanes32(n - col);
        uint16_t *first = panels + col / 16 * panel, *second = first + panel;
        const bool both = n - col > 16;
        for (int64_t row = 0; row < deep; row += 2) {
            const uint16_t *at = b + row * row_stride + col;
            const __m512i even = row < k ? _mm512_maskz_loadu_epi16(lanes, at) : _mm512_setzero_si512();
            const __m512i odd = row + 1 < k ? _mm512_maskz_loadu_epi16(lanes, at + row_stride) : _mm512_setzero_si512();
            // The columns that are packed next.
            _mm_prefetch(at + 32, _MM_HINT_T1);
            _mm_prefetch(at + row_stride + 32, _MM_HINT_T1);
            __m512i one, two;
            interleave(even, odd, &one, &two);
            _mm512_storeu_si512(first + row * 16, one);
            if (both) _mm512_storeu_si512(second + row * 16, two);
        }
    }
}

// Panels of B [k, n], given its transpose [n, k], whose rows lie row_stride numbers apart; zeros behind k and n.
inline void pack_columns(const uint16_t *bt, int64_t row_stride, int64_t k, int64_t n, uint16_t *panels) {
    const int64_t deep = padded(k);
    for (int64_t col = 0; col < n; col += 16)
        for (int64_t row = 0; row < deep; row += 32, panels += 512) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = col + i < n ? _mm512_maskz_loadu_epi16(lanes32(k - row), bt + (col + i) * row_stride + row)
                                   : _mm512_setzero_si512();
            transpose16(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(panels + i * 32, r[i]);
        }
}

// The transpose [n, k] of A [k, n], a left side: rows of padded(k) numbers, as many as padded16(n).
inline void transpose(const uint16_t *a, int64_t row_stride, int64_t k, int64_t n, uint16_t *out) {
    const int64_t deep = padded(k);
    for (int64_t col = 0; col < n; col += 16)
        for (int64_t row = 0; row < deep; row += 32) {
            __m512i r[16], unused;
            for (int i = 0; i < 16; i++) {
                const int64_t at = row + 2 * i;
                const __mmask32 lanes = lanes32(n - col) & 0xffff;
                const uint16_t *from = a + at * row_stride + col;
                const __m512i even = at < k ? _mm512_maskz_loadu_epi16(lanes, from) : _mm512_setzero_si512();
                const __m512i odd =
                    at + 1 < k ? _mm512_maskz_loadu_epi16(lanes, from + row_stride) : _mm512_setzero_si512();
                interleave(even, odd, &r[i], &unused);
            }
            transpose16(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (col + i) * deep + row, r[i]);
        }
}

// 16 or 32 rows and columns of a product by AMX.
template <bool HIGH, bool WIDE>
inline void amx_block(const uint16_t *a, int64_t a_stride, const uint16_t *b, int64_t panel, float *c, int64_t c_stride,
                      int64_t k, bool add) {
    const int64_t lda = a_stride * 2, ldc = c_stride * 4;
    const uint16_t *below = a + 16 * a_stride, *right = b + panel;
    float *lower = c + 16 * c_stride;
    publish(a);
    if (add) {
        _tile_loadd(0, c, ldc);
        if (WIDE) _tile_loadd(1, c + 16, ldc);
        if (HIGH) _tile_loadd(2, lower, ldc);
        if (HIGH && WIDE) _tile_loadd(3, lower + 16, ldc);
    } else {
        _tile_zero(0);
        if (WIDE) _tile_zero(1);
        if (HIGH) _tile_zero(2);
        if (HIGH && WIDE) _tile_zero(3);
    }
    for (int64_t at = 0; at < k; at += 32) {
        _tile_loadd(6, b + at * 16, 64);
        _tile_loadd(4, a + at, lda);
        if (WIDE) _tile_loadd(7, right + at * 16, 64);
        if (HIGH) _tile_loadd(5, below + at, lda);
        _tile_dpbf16ps(0, 4, 6);
        if (WIDE) _tile_dpbf16ps(1, 4, 7);
        if (HIGH) _tile_dpbf16ps(2, 5, 6);
        if (HIGH && WIDE) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc);
    if (WIDE) _tile_stored(1, c + 16, ldc);
    if (HIGH) _tile_stored(2, lower, ldc);
    if (HIGH && WIDE) _tile_stored(3, lower + 16, ldc);
}

// 16 rows and 16 columns of a product by AVX512.
inline void avx_block(const uint16_t *a, int64_t a_stride, const uint16_t *b, float *c, int64_t c_stride, int64_t k,
                      bool add) {
    __m512 sums[16];
    for (int i = 0; i < 16; i++) sums[i] = add ? _mm512_loadu_ps(c + i * c_stride) : _mm512_setzero_ps();
    for (int64_t at = 0; at < k; at += 2) {
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b + at * 16);
        for (int i = 0; i < 16; i++) {
            int32_t pair;
            __builtin_memcpy(&pair, a + i * a_stride + at, sizeof pair);
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_epi32(pair), right);
        }
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_ps(c + i * c_stride, sums[i]);
}

// c [m, n] = (add: +=) a [m, k] B; m and n are multiples of 16, k of 32. panel: numbers from one panel of B to the next.
inline void multiply(const Tiles &tiles, const uint16_t *a, int64_t a_stride, const uint16_t *panels, int64_t panel,
                     float *c, int64_t c_stride, int64_t m, int64_t n, int64_t k, bool add) {
    for (int64_t col = 0; col < n; col += 32) {
        const uint16_t *b = panels + col / 16 * panel;
        const bool wide = n - col > 16;
        for (int64_t row = 0; row < m; row += 32) {
            const uint16_t *left = a + row * a_stride;
            float *to = c + row * c_stride + col;
            const bool high = m - row > 16;
            if (!tiles.amx) {
                for (int i = 0; i < (high ? 32 : 16); i += 16)
                    for (int j = 0; j < (wide ? 2 : 1); j++)
                        avx_block(left + i * a_stride, a_stride, b + j * panel, to + i * c_stride + 16 * j, c_stride, k,
                                  add);
            } else if (high && wide) {
                amx_block<true, true>(left, a_stride, b, panel, to, c_stride, k, add);
            } else if (high) {
                amx_block<true, false>(left, a_stride, b, panel, to, c_stride, k, add);
            } else if (wide) {
                amx_block<false, true>(left, a_stride, b, panel, to, c_stride, k, add);
            } else {
                amx_block<false, false>(left, a_stride, b, panel, to, c_stride, k, add);
            }
        }
    }
}

// Hands out scratch, on the boundaries of cache lines. From null it measures.
class Scratch {
   public:
    explicit Scratch(void *memory) : begin_(static_cast<char *>(memory)), at_(begin_) {}
    template <class T>
    T *take(int64_t count) {
        T *found = reinterpret_cast<T *>(at_);
        at_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return found;
    }
    int64_t bytes() const { return at_ - begin_; }

   private:
    char *begin_, *at_;
};

}  // namespace clif::training
