// Attention of up to 4 queries to one KV head, as rows that continue an answer have: keys and values are multiplied where
// they lie in the cache. The sums have the terms and the order of AMX, and so its bits (multiply_amx): of 32 terms the
// even ones and the odd ones are summed apart, without subnormal numbers, and added to each other and to what is there.
#pragma once
#include "attention_tiles.h"

namespace clif {

constexpr int64_t FEW = 4;

// Scores of 16 tokens, whose keys lie a head apart from `keys` on: to [16 tokens, 16 queries]. queries: as pack_keys
// makes it of 16 queries; loaded: they are in tiles 6 and 7, which is what heads of 64 numbers take.
inline void score_tokens(const uint16_t *keys, int64_t head_dim, const uint32_t *queries, bool loaded, float *to) {
    publish(keys);
    publish(queries);
    _tile_zero(0);
    if (loaded) {
        _tile_loadd(4, keys, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, keys + 32, 128);
        _tile_dpbf16ps(0, 5, 7);
    } else {
        for (int64_t k = 0; k < head_dim / 2; k += TILE) {
            _tile_loadd(4, keys + 2 * k, head_dim * 2);
            _tile_loadd(5, queries + k * TILE, 64);
            _tile_dpbf16ps(0, 4, 5);
        }
    }
    _tile_stored(0, to, 64);
}

// Whether the queries of a head are in tiles now.
inline bool load_queries(const uint32_t *queries, int64_t head_dim) {
    if (head_dim != 64) return false;
    publish(queries);
    _tile_loadd(6, queries, 64);
    _tile_loadd(7, queries + TILE * TILE, 64);
    return true;
}

// [16 tokens, 16 queries] -> the first 4 queries' scores, rows of 16 tokens, so many numbers apart.
inline void turn_scores(const float *scores, float *to, int64_t stride) {
    const uint32_t *rows[TILE];
    for (int64_t i = 0; i < TILE; ++i) rows[i] = reinterpret_cast<const uint32_t *>(scores + i * TILE);
    transpose_quad(rows, 0, reinterpret_cast<uint32_t *>(to), stride);
}

// Sums of 32 numbers for each query.
template <int QUERIES>
struct Parts {
    __m512 low[QUERIES], high[QUERIES];

    Parts() {
        // One by one: as a whole they would be cleared in memory.
#pragma GCC unroll 4
        for (int i = 0; i < QUERIES; ++i) low[i] = high[i] = _mm512_setzero_ps();
    }

    void add(const float *weights, int64_t weight_stride, const uint16_t *values) {
        const __m512i zero = _mm512_setzero_si512(), value = _mm512_loadu_si512(values);
        const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, value));
        const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, value));
#pragma GCC unroll 4
        for (int i = 0; i < QUERIES; ++i) {
            const __m512 weight = splat(weights[i * weight_stride]);
            low[i] = _mm512_fmadd_ps(weight, first, low[i]);
            high[i] = _mm512_fmadd_ps(weight, second, high[i]);
        }
    }
};

// sums [QUERIES, 32] += weights [QUERIES, tokens] values [tokens, 32] for an even number of up to 32 tokens, in the order
// of pack_values.
template <int QUERIES>
void add_32(const float *weights, int64_t weight_stride, const uint16_t *const *values, int64_t tokens, int64_t at,
            float *sums, int64_t sum_stride) {
    Parts<QUERIES> even, odd;
    for (int64_t token = 0; token < tokens; token += 2) {
        even.add(weights + token, weight_stride, values[token] + at);
        odd.add(weights + token + 1, weight_stride, values[token + 1] + at);
    }
    for (int i = 0; i < QUERIES; ++i) {
        float *to = sums + i * sum_stride;
        const __m512 low = _mm512_add_ps(even.low[i], odd.low[i]), high = _mm512_add_ps(even.high[i], odd.high[i]);
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), low));
        _mm512_storeu_ps(to + TILE, _mm512_add_ps(_mm512_loadu_ps(to + TILE), high));
    }
}

// sums [n, head_dim] += weights [n, tokens] values [tokens, head_dim], for n up to 4, an even number of tokens and whole
// 32 numbers.
template <int QUERIES = FEW>
void add_few(int64_t n, const float *weights, int64_t weight_stride, const uint16_t *const *values, int64_t tokens,
             int64_t head_dim, float *sums) {
    if constexpr (QUERIES > 1) {
        if (n < QUERIES) return add_few<QUERIES - 1>(n, weights, weight_stride, values, tokens, head_dim, sums);
    }
    for (int64_t token = 0; token < tokens; token += 32) {
        const int64_t left = tokens - token;
        for (int64_t at = 0; at < head_dim; at += 32) {
            add_32<QUERIES>(weights + token, weight_stride, values + token, left < 32 ? left : 32, at, sums + at, head_dim);
        }
    }
}

// While it lives, subnormal numbers count as zero and become zero, as in AMX.
class NoSubnormals {
   public:
    NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~NoSubnormals() { _mm_setcsr(before_); }

   private:
    unsigned before_;
};

}  // namespace clif
