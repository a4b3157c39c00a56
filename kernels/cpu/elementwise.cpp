// What a decoder layer computes between its products, and the choice of greedy tokens. The specification is
// kernels/elementwise_reference.py: a number is rounded to the type wherever torch's operators there round it, except
// inside the rotation, which rounds once.
//
// Sources: rotary embeddings (Su et al. 2021); RMSNorm (Zhang and Sennrich 2019); SwiGLU (Shazeer 2020).
#include <math.h>
#include <string.h>

#include "parts.h"
#include "vector.h"

namespace clif {
namespace {

// Columns of a row that one thread takes at least: whole cache lines.
constexpr int64_t COLUMNS = 256;

// sum = hidden + added, rounded. Returns the sum of its squares, in an order that depends on the width alone.
template <class T>
float add_row(const T *hidden, const T *added, T *sum, int64_t width) {
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < width; i += LANES) {
        const __mmask16 mask = first_lanes(width - i);
        __m512 x = load(hidden + i, mask);
        if (added) x = rounded<T>(_mm512_add_ps(x, load(added + i, mask)));
        if (sum != hidden || added) store(sum + i, x, mask);
        __m512 &part = squares[i / LANES & 1];
        part = _mm512_fmadd_ps(x, x, part);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
}

// out = row * scale * weight, rounded between where the weight is of the row's type.
template <class T, class W>
void weigh_row(const T *row, float scale, const W *weight, T *out, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        const __mmask16 mask = first_lanes(width - i);
        const __m512 normed = rounded<W>(_mm512_mul_ps(load(row + i, mask), splat(scale)));
        store(out + i, _mm512_mul_ps(load(weight + i, mask), normed), mask);
    }
}

template <class T>
void norm_row(const T *hidden, const T *added, const clif_norm &norm, T *sum, T *out, int64_t width) {
    const float mean = add_row(hidden, added, sum, width) / static_cast<float>(width);
    const float scale = 1.0f / sqrtf(mean + norm.eps);
    if (norm.wide) {
        weigh_row(sum, scale, static_cast<const float *>(norm.weight), out, width);
    } else {
        weigh_row(sum, scale, static_cast<const T *>(norm.weight), out, width);
    }
}

// The front of a head in place: x cos + (its halves swapped) sin. angles: cosines, then sines.
template <class T>
void rotate_head(T *head, const T *angles, int64_t rotary_dim) {
    const int64_t half = rotary_dim / 2;
    const T *cos = angles, *sin = angles + rotary_dim;
    for (int64_t i = 0; i < half; i += LANES) {
        const __mmask16 mask = first_lanes(half - i);
        const __m512 a = load(head + i, mask), b = load(head + half + i, mask);
        const __m512 turned_a = _mm512_mul_ps(b, load(sin + i, mask));
        const __m512 turned_b = _mm512_mul_ps(a, load(sin + half + i, mask));
        store(head + i, _mm512_add_ps(_mm512_mul_ps(a, load(cos + i, mask)), turned_a), mask);
        store(head + half + i, _mm512_add_ps(_mm512_mul_ps(b, load(cos + half + i, mask)), turned_b), mask);
    }
}

// What becomes of head number `at` of a row: query heads, then keys, then values.
template <class T>
void finish_head(const clif_heads &heads, int64_t at, T *head, const T *angles) {
    if (at >= heads.heads + heads.kv_heads) return;
    const clif_norm &norm = at < heads.heads ? heads.q_norm : heads.k_norm;
    if (norm.weight) norm_row<T>(head, nullptr, norm, head, head, heads.head_dim);
    rotate_head(head, angles, heads.rotary_dim);
}

template <int ACTIVATION, class T>
void gate_columns(const T *gate, const T *up, T *out, Range columns) {
    for (int64_t i = columns.begin; i < columns.end; i += LANES) {
        const __mmask16 mask = first_lanes(columns.end - i);
        const __m512 gated = rounded<T>(activated<ACTIVATION>(load(gate + i, mask)));
        store(out + i, _mm512_mul_ps(gated, load(up + i, mask)), mask);
    }
}

template <int ACTIVATION, class T>
void gate_pieces(const T *wide, T *out, int64_t rows, int64_t inner, int thread, int threads) {
    const int64_t pieces = (inner + COLUMNS - 1) / COLUMNS;
    const Range mine = share(rows * pieces, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t row = i / pieces, begin = i % pieces * COLUMNS;
        const T *gate = wide + row * 2 * inner;
        gate_columns<ACTIVATION>(gate, gate + inner, out + row * inner,
                                 {begin, begin + COLUMNS < inner ? begin + COLUMNS : inner});
    }
}

// The largest number of a row; NaN if there is one.
template <class T>
float largest_of(const T *row, int64_t width) {
    __m512 largest[2] = {splat(-INFINITY), splat(-INFINITY)};
    __mmask16 unordered = 0;
    for (int64_t i = 0; i < width; i += LANES) {
        const __mmask16 mask = first_lanes(width - i);
        const __m512 x = load(row + i, mask);
        unordered |= _mm512_mask_cmp_ps_mask(mask, x, x, _CMP_UNORD_Q);
        __m512 &part = largest[i / LANES & 1];
        part = _mm512_mask_max_ps(part, mask, part, x);
    }
    return unordered ? NAN : _mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1]));
}

template <class T>
int64_t first_of(const T *row, int64_t width, float value) {
    for (int64_t i = 0; i < width; i += LANES) {
        const __mmask16 mask = first_lanes(width - i);
        const __mmask16 equal = _mm512_mask_cmp_ps_mask(mask, load(row + i, mask), splat(value), _CMP_EQ_OQ);
        if (equal) return i + __builtin_ctz(equal);
    }
    return -1;
}

template <class T>
void argmax(const T *logits, int64_t *best, int64_t rows, int64_t width, int thread, int threads) {
    const Range mine = share(rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const float largest = largest_of(logits + row * width, width);
        best[row] = isfinite(largest) ? first_of(logits + row * width, width, largest) : -1;
    }
}

}  // namespace

template <class T>
void rms_norm(const T *hidden, const T *added, const clif_norm &norm, T *sum, T *out, int64_t rows, int64_t width,
              int thread, int threads) {
    const Range mine = share(rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const int64_t at = row * width;
        norm_row(hidden + at, added ? added + at : nullptr, norm, sum + at, out + at, width);
    }
}

template <class T>
void rms_norm_in_place(T *x, int64_t stride, const clif_norm &norm, int64_t rows, int64_t width, int thread,
                       int threads) {
    const Range mine = share(rows, thread, threads);
    for (T *row = x + mine.begin * stride; row < x + mine.end * stride; row += stride) {
        norm_row<T>(row, nullptr, norm, row, row, width);
    }
}

template <class T>
void rotate(const clif_heads &heads, T *qkv, const T *angles, const int64_t *positions, T *cache, int64_t cache_slots,
            const int64_t *slots, int64_t rows, int thread, int threads) {
    const int64_t d = heads.head_dim, of_row = heads.heads + 2 * heads.kv_heads;
    const Range mine = share(rows * of_row, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t row = i / of_row, at = i % of_row, cached = at - heads.heads;
        T *head = qkv + i * d;
        finish_head(heads, at, head, angles + positions[row] * 2 * heads.rotary_dim);
        if (cache && cached >= 0) memcpy(cache + (cached * cache_slots + slots[row]) * d, head, d * sizeof(T));
    }
}

template <class T>
void gated(int activation, const T *wide, T *out, int64_t rows, int64_t inner, int thread, int threads) {
    if (activation == CLIF_SILU) {
        gate_pieces<CLIF_SILU>(wide, out, rows, inner, thread, threads);
    } else {
        gate_pieces<CLIF_GELU>(wide, out, rows, inner, thread, threads);
    }
}

// Each for both types, for layers.cpp as well.
template void rms_norm(const float *, const float *, const clif_norm &, float *, float *, int64_t, int64_t, int, int);
template void rms_norm(const uint16_t *, const uint16_t *, const clif_norm &, uint16_t *, uint16_t *, int64_t, int64_t,
                       int, int);
template void rms_norm_in_place(uint16_t *, int64_t, const clif_norm &, int64_t, int64_t, int, int);
template void rotate(const clif_heads &, float *, const float *, const int64_t *, float *, int64_t, const int64_t *,
                     int64_t, int, int);
template void rotate(const clif_heads &, uint16_t *, const uint16_t *, const int64_t *, uint16_t *, int64_t,
                     const int64_t *, int64_t, int, int);
template void gated(int, const float *, float *, int64_t, int64_t, int, int);
template void gated(int, const uint16_t *, uint16_t *, int64_t, int64_t, int, int);

}  // namespace clif

CLIF_API void clif_rms_norm(int type, const void *hidden, const void *added, const clif_norm *norm, void *sum, void *out,
                            int64_t rows, int64_t width, int threads) {
    clif::of_type(type, [&](auto number) {
        using T = decltype(number);
        clif::on_threads(threads, [&](int thread, int count) {
            clif::rms_norm<T>(static_cast<const T *>(hidden), static_cast<const T *>(added), *norm,
                              static_cast<T *>(sum), static_cast<T *>(out), rows, width, thread, count);
        });
    });
}

CLIF_API void clif_rotate(int type, const clif_heads *heads, void *qkv, const void *angles, const int64_t *positions,
                          void *cache, int64_t cache_slots, const int64_t *slots, int64_t rows, int threads) {
    clif::of_type(type, [&](auto number) {
        using T = decltype(number);
        clif::on_threads(threads, [&](int thread, int count) {
            clif::rotate<T>(*heads, static_cast<T *>(qkv), static_cast<const T *>(angles), positions,
                            static_cast<T *>(cache), cache_slots, slots, rows, thread, count);
        });
    });
}

CLIF_API void clif_gate(int type, int activation, const void *wide, void *out, int64_t rows, int64_t inner, int threads) {
    clif::of_type(type, [&](auto number) {
        using T = decltype(number);
        clif::on_threads(threads, [&](int thread, int count) {
            clif::gated<T>(activation, static_cast<const T *>(wide), static_cast<T *>(out), rows, inner, thread, count);
        });
    });
}

CLIF_API void clif_argmax(int type, const void *logits, int64_t *best, int64_t rows, int64_t width, int threads) {
    clif::of_type(type, [&](auto number) {
        using T = decltype(number);
        clif::on_threads(threads, [&](int thread, int count) {
            clif::argmax<T>(static_cast<const T *>(logits), best, rows, width, thread, count);
        });
    });
}
