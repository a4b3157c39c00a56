// Pieces of packed matrices as bfloat16 numbers, however they are kept: see clif_linear in clif_cpu.h.
#pragma once
#include "vector.h"

namespace clif {

constexpr int64_t PANEL = 16;            // outputs that lie together in a packed matrix
constexpr int64_t DEPTH = 32;            // inputs that lie together
constexpr int64_t TILE = PANEL * DEPTH;  // numbers of a packed piece: 1 KiB in bfloat16

// The numbers of a panel from a tile on; scales, least: of 4 bits, PANEL for each tile.
struct Panel {
    const uint8_t *numbers;
    const uint16_t *scales, *least;
};

// 16 whole numbers of 8 bits. Bits of float32 numbers whose lower halves are zero.
inline __m512i whole8(const uint8_t *from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

// Whole numbers of 8 bits are bfloat16 numbers: nothing is rounded, and their scales are left to the sums.
inline void widen8(const uint8_t *from, uint16_t *to) {
    for (int64_t pair = 0; pair < DEPTH / 2; pair++, from += 2 * PANEL, to += 2 * PANEL)
        _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(whole8(from), 16), whole8(from + PANEL)));
}

// Numbers of 4 bits times their scale, plus the least number, rounded once.
inline void widen4(const uint8_t *from, const uint16_t *scales, const uint16_t *least, uint16_t *to) {
    alignas(64) static const float values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    // Each output twice: for both inputs of a pair.
    alignas(64) static const int32_t twice[32] = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                                                  8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    const __m512i first = _mm512_load_si512(twice), second = _mm512_load_si512(twice + 16);
    const __m512 scale = load(scales), base = least ? load(least) : _mm512_mul_ps(scale, splat(-8.0f));
    const __m512 scale0 = _mm512_permutexvar_ps(first, scale), scale1 = _mm512_permutexvar_ps(second, scale);
    const __m512 base0 = _mm512_permutexvar_ps(first, base), base1 = _mm512_permutexvar_ps(second, base);
    const __m512 table = _mm512_load_ps(values);
    for (int half = 0; half < 2; half++, from += 2 * 64) {
        __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
#pragma GCC unroll 8
        for (int pair = 0; pair < 8; pair++, to += 2 * PANEL) {
            // The lowest four bits of each lane choose; those above are ignored.
            const __m512 x = _mm512_fmadd_ps(_mm512_permutexvar_ps(a, table), scale0, base0);
            const __m512 y = _mm512_fmadd_ps(_mm512_permutexvar_ps(b, table), scale1, base1);
            _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(y, x));
            a = _mm512_srli_epi32(a, 4);
            b = _mm512_srli_epi32(b, 4);
        }
    }
}

// Tile k of a panel as bfloat16 numbers [16 pairs of inputs][16 outputs][2]: where it lies, or in `room`, widened.
template <int BITS>
inline const uint16_t *tile_of(const Panel &panel, int64_t k, uint16_t *room) {
    if constexpr (BITS == 16) return reinterpret_cast<const uint16_t *>(panel.numbers) + k * TILE;
    if constexpr (BITS == 8) widen8(panel.numbers + k * TILE, room);
    if constexpr (BITS == 4) {
        const uint16_t *least = panel.least ? panel.least + k * PANEL : nullptr;
        widen4(panel.numbers + k * (TILE / 2), panel.scales + k * PANEL, least, room);
    }
    return room;
}

}  // namespace clif
