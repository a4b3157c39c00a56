// Pieces of packed matrices as bfloat16 numbers, however they are kept: see clif_linear in clif_cpu.h.
#pragma once
#include "clif_cpu.h"
#include "vector.h"

namespace clif {

constexpr int64_t PANEL = 16;            // outputs that lie together in a packed matrix
constexpr int64_t DEPTH = 32;            // inputs that lie together
constexpr int64_t TILE = PANEL * DEPTH;  // numbers of a packed piece: 1 KiB in bfloat16

// How numbers are kept: 16, 8 and 4 are their bits; of 8 bits with scales by output, which are left to the sums, or:
constexpr int GROUPED = 9;  // of 8 bits with scales by group of inputs
constexpr int bits_of(int form) { return form == GROUPED ? 8 : form; }
inline int form_of(const clif_linear &linear) {
    const bool grouped = linear.bits == 8 && (linear.group_shift != CLIF_BY_OUTPUT || linear.least);
    return grouped ? GROUPED : static_cast<int>(linear.bits);
}

// 16 scales, or what is added, of one group of each output.
inline __m512 load_any(const void *from, int64_t row, int64_t type) {
    const int64_t at = row * PANEL;
    switch (type) {
        case CLIF_BFLOAT16: return load(static_cast<const uint16_t *>(from) + at);
        case CLIF_FLOAT16: return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at)));
        case CLIF_FLOAT32: return load(static_cast<const float *>(from) + at);
        default: return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)from + at))));
    }
}

// Scales of the groups of a panel's inputs: see clif_linear. first: rows of 16 scales before this panel's.
struct Groups {
    const void *scales = nullptr, *least = nullptr;
    int64_t scale_type = 0, least_type = 0, shift = 0, first = 0;

    Groups of_panel(int64_t panel, int64_t tiles) const {
        Groups found = *this;
        found.first = panel * (shift < 0 ? 2 * tiles : ((tiles - 1) >> shift) + 1);
        return found;
    }
    int64_t row(int64_t tile, int half) const { return first + (shift < 0 ? 2 * tile + half : tile >> shift); }
    __m512 scale(int64_t row) const { return load_any(scales, row, scale_type); }
    // What zero stands for, given the scale: `number` is what does by itself.
    __m512 base(int64_t row, __m512 scale, float number) const {
        if (!least) return _mm512_mul_ps(scale, splat(-number));
        const __m512 found = load_any(least, row, least_type);
        return least_type == CLIF_INT8 ? _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_setzero_ps(), found)) : found;
    }
};
inline Groups groups_of(const clif_linear &linear) {
    return {linear.scales, linear.least, linear.scale_type, linear.least_type, linear.group_shift};
}

// The numbers of a panel from a tile on.
struct Panel {
    const uint8_t *numbers;
    Groups groups;
    int64_t tile;
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

// The same with scales by group: numbers times their scale, plus what is added, rounded once.
inline void widen8(const uint8_t *from, const Groups &groups, int64_t tile, uint16_t *to) {
    alignas(64) static const uint16_t pairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i side_by_side = _mm512_load_si512(pairs);
    for (int half = 0; half < 2; half++) {
        const int64_t row = groups.row(tile, half);
        const __m512 scale = groups.scale(row), base = groups.base(row, scale, 0.0f);
        for (int pair = 0; pair < 8; pair++, from += 2 * PANEL, to += 2 * PANEL) {
            const __m512 x = _mm512_fmadd_ps(_mm512_castsi512_ps(whole8(from)), scale, base);
            const __m512 y = _mm512_fmadd_ps(_mm512_castsi512_ps(whole8(from + PANEL)), scale, base);
            const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(y, x);
            _mm512_store_si512(to, _mm512_permutexvar_epi16(side_by_side, rounded));
        }
    }
}

// Numbers of 4 bits times their scale, plus what is added, rounded once.
inline void widen4(const uint8_t *from, const Groups &groups, int64_t tile, uint16_t *to) {
    alignas(64) static const float values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    // Each output twice: for both inputs of a pair.
    alignas(64) static const int32_t twice[32] = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                                                  8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    const __m512i first = _mm512_load_si512(twice), second = _mm512_load_si512(twice + 16);
    const __m512 table = _mm512_load_ps(values);
    __m512 scale0, scale1, base0, base1;
    for (int half = 0; half < 2; half++, from += 2 * 64) {
        if (half == 0 || groups.shift < 0) {
            const int64_t row = groups.row(tile, half);
            const __m512 scale = groups.scale(row), base = groups.base(row, scale, 8.0f);
            scale0 = _mm512_permutexvar_ps(first, scale), scale1 = _mm512_permutexvar_ps(second, scale);
            base0 = _mm512_permutexvar_ps(first, base), base1 = _mm512_permutexvar_ps(second, base);
        }
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
template <int FORM>
inline const uint16_t *tile_of(const Panel &panel, int64_t k, uint16_t *room) {
    if constexpr (FORM == 16) return reinterpret_cast<const uint16_t *>(panel.numbers) + k * TILE;
    if constexpr (FORM == 8) widen8(panel.numbers + k * TILE, room);
    if constexpr (FORM == GROUPED) widen8(panel.numbers + k * TILE, panel.groups, panel.tile + k, room);
    if constexpr (FORM == 4) widen4(panel.numbers + k * (TILE / 2), panel.groups, panel.tile + k, room);
    return room;
}

}  // namespace clif
