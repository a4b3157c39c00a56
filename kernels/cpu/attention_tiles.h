// Products of attention, and the layouts that they read: tiles of 16 columns, whose rows are dwords of one float32 or two
// bfloat16 numbers that are multiplied and summed together.
#pragma once
#include "parts.h"
#include "vector.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16")

namespace clif {

constexpr int64_t TILE = 16, MAX_HEAD_DIM = 256;

template <class T>
constexpr int64_t PER_DWORD = static_cast<int64_t>(4 / sizeof(T));
// Numbers that a register of AMX has in a row; every inner size is padded to it.
template <class T>
constexpr int64_t PER_ROW = TILE * PER_DWORD<T>;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The left side of a product: rows of numbers, so many numbers apart.
template <class T>
struct Left {
    const T *at;
    int64_t stride;
};
// The right side: tiles of 16 dwords in a row; dwords from one row to the next, and from one tile to the next.
struct Right {
    const uint32_t *at;
    int64_t row, tile;
};
// The result: rows of tiles of 16 sums; adds: to what is there.
struct Sums {
    float *at;
    int64_t stride;
    bool adds;
};
// rows of the left side, dwords that are summed (a multiple of 16), tiles of the right side.
struct Size {
    int64_t rows, dwords, tiles;
};

// sum + a b, with the sum of the two products of bfloat16 numbers.
template <class T>
__m512 multiply_add(__m512 sum, __m512i b, uint32_t a);
template <>
inline __m512 multiply_add<float>(__m512 sum, __m512i b, uint32_t a) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a))), _mm512_castsi512_ps(b), sum);
}
template <>
inline __m512 multiply_add<uint16_t>(__m512 sum, __m512i b, uint32_t a) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}

inline uint32_t dword_of(const void *from) {
    uint32_t x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

// So many rows of one tile.
template <class T, int ROWS>
void multiply_rows(Left<T> a, Right b, Sums c, int64_t dwords) {
    __m512 sums[ROWS];
    for (int i = 0; i < ROWS; ++i) sums[i] = c.adds ? _mm512_loadu_ps(c.at + i * c.stride) : _mm512_setzero_ps();
    for (int64_t k = 0; k < dwords; ++k) {
        const __m512i column = _mm512_loadu_si512(b.at + k * b.row);
        for (int i = 0; i < ROWS; ++i) {
            sums[i] = multiply_add<T>(sums[i], column, dword_of(a.at + i * a.stride + k * PER_DWORD<T>));
        }
    }
    for (int i = 0; i < ROWS; ++i) _mm512_storeu_ps(c.at + i * c.stride, sums[i]);
}

template <class T, int ROWS>
void multiply_last(Left<T> a, Right b, Sums c, Size size) {
    if constexpr (ROWS > 0) {
        if (size.rows == ROWS) return multiply_rows<T, ROWS>(a, b, c, size.dwords);
        multiply_last<T, ROWS - 1>(a, b, c, size);
    }
}

// By vectors. The order of a sum's terms is that of the dwords.
template <class T>
void multiply(Left<T> a, Right b, Sums c, Size size) {
    constexpr int ROWS = 8;
    for (int64_t tile = 0; tile < size.tiles; ++tile, b.at += b.tile, c.at += TILE) {
        int64_t row = 0;
        for (; row + ROWS <= size.rows; row += ROWS) {
            multiply_rows<T, ROWS>({a.at + row * a.stride, a.stride}, b, {c.at + row * c.stride, c.stride, c.adds},
                                   size.dwords);
        }
        multiply_last<T, ROWS - 1>({a.at + row * a.stride, a.stride}, b, {c.at + row * c.stride, c.stride, c.adds},
                                   {size.rows - row, size.dwords, 1});
    }
}

// All tile registers have 16 rows: a product takes its time by the rows of the right side, few on the left save nothing.
// What lies behind the last row of the left side is multiplied as well, and its sums are never read.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};

inline void shape_tiles() {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) shapes.rows[i] = TILE;
    publish(&shapes);
    _tile_loadconfig(&shapes);
}

inline void multiply_one(Left<uint16_t> a, Right b, Sums c, int64_t dwords) {
    if (c.adds) {
        _tile_loadd(0, c.at, c.stride * 4);
    } else {
        _tile_zero(0);
    }
    for (int64_t k = 0; k < dwords; k += TILE) {
        _tile_loadd(4, a.at + 2 * k, a.stride * 2);
        _tile_loadd(5, b.at + k * b.row, b.row * 4);
        _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, c.at, c.stride * 4);
}

// Four tiles share each load of the left side, and their products do not wait for one another.
inline void multiply_four(Left<uint16_t> a, Right b, Sums c, int64_t dwords) {
    const int64_t stride = c.stride * 4, row = b.row * 4;
    if (c.adds) {
        _tile_loadd(0, c.at, stride);
        _tile_loadd(1, c.at + TILE, stride);
        _tile_loadd(2, c.at + 2 * TILE, stride);
        _tile_loadd(3, c.at + 3 * TILE, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < dwords; k += TILE) {
        const uint32_t *at = b.at + k * b.row;
        _tile_loadd(4, a.at + 2 * k, a.stride * 2);
        _tile_loadd(5, at, row);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, at + b.tile, row);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, at + 2 * b.tile, row);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, at + 3 * b.tile, row);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c.at, stride);
    _tile_stored(1, c.at + TILE, stride);
    _tile_stored(2, c.at + 2 * TILE, stride);
    _tile_stored(3, c.at + 3 * TILE, stride);
}

// By AMX: always 16 rows.
inline void multiply_amx(Left<uint16_t> a, Right b, Sums c, Size size) {
    publish(a.at);
    publish(b.at);
    publish(c.at);
    int64_t tile = 0;
    for (; tile + 4 <= size.tiles; tile += 4, b.at += 4 * b.tile, c.at += 4 * TILE) multiply_four(a, b, c, size.dwords);
    for (; tile < size.tiles; ++tile, b.at += b.tile, c.at += TILE) multiply_one(a, b, c, size.dwords);
}

// Dwords 4 * quad to 4 * quad + 3 of 16 rows -> four rows of 16 dwords, so many dwords apart.
inline void transpose_quad(const uint32_t *const rows[TILE], int64_t quad, uint32_t *to, int64_t stride = TILE) {
    __m512i by_four[4];
    for (int i = 0; i < 4; ++i) {
        const auto part = [&](int lane) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[4 * lane + i]) + quad);
        };
        __m512i x = _mm512_castsi128_si512(part(0));
        x = _mm512_mask_broadcast_i32x4(x, 0x00f0, part(1));
        x = _mm512_mask_broadcast_i32x4(x, 0x0f00, part(2));
        by_four[i] = _mm512_mask_broadcast_i32x4(x, 0xf000, part(3));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(by_four[0], by_four[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(by_four[2], by_four[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(by_four[0], by_four[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(by_four[2], by_four[3]);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(to + stride, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(to + 2 * stride, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(to + 3 * stride, _mm512_unpackhi_epi64(high01, high23));
}

// 16 keys -> one tile: its rows are dwords of a key, so many of them and zeros up to `padded`.
template <class T>
void pack_keys(const T *const keys[TILE], int64_t head_dim, int64_t padded, uint32_t *to) {
    const uint32_t *rows[TILE];
    for (int i = 0; i < TILE; ++i) rows[i] = reinterpret_cast<const uint32_t *>(keys[i]);
    const int64_t dwords = head_dim / PER_DWORD<T>;
    for (int64_t quad = 0; quad < dwords / 4; ++quad) transpose_quad(rows, quad, to + 4 * TILE * quad);
    for (int64_t k = dwords; k < padded; ++k) _mm512_storeu_si512(to + k * TILE, _mm512_setzero_si512());
}

// Tiles of 16 numbers of a value that its head takes. Those of bfloat16 come in pairs.
template <class T>
int64_t value_tiles(int64_t head_dim) {
    return round_up(head_dim, PER_ROW<T>) / TILE;
}

// Values of as many tokens as a dword has numbers -> one row of all tiles of a head.
inline void pack_values(const float *const values[1], int64_t head_dim, uint32_t *to) {
    for (int64_t i = 0; i < head_dim; i += TILE) {
        _mm512_storeu_si512(to + i, _mm512_castps_si512(load(values[0] + i, first_lanes(head_dim - i))));
    }
}
// Numbers 0 to 3, 8 to 11, 16 to 19 and 24 to 27 of 32 become the columns of one tile, the others those of the next:
// as the instructions lay them out. store_head puts them back.
inline void pack_values(const uint16_t *const values[2], int64_t head_dim, uint32_t *to) {
    for (int64_t i = 0; i < head_dim; i += 2 * TILE) {
        const __mmask32 mask = head_dim - i >= 32 ? 0xffffffffu : (1u << (head_dim - i)) - 1;
        const __m512i a = _mm512_maskz_loadu_epi16(mask, values[0] + i);
        const __m512i b = _mm512_maskz_loadu_epi16(mask, values[1] + i);
        _mm512_storeu_si512(to + i, _mm512_unpacklo_epi16(a, b));
        _mm512_storeu_si512(to + i + TILE, _mm512_unpackhi_epi16(a, b));
    }
}

// The sums of a head, times a factor, to memory in their order.
inline void store_head(const float *sums, float factor, int64_t head_dim, float *to) {
    for (int64_t i = 0; i < head_dim; i += TILE) {
        store(to + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), splat(factor)), first_lanes(head_dim - i));
    }
}
inline void store_head(const float *sums, float factor, int64_t head_dim, uint16_t *to) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t i = 0; i < head_dim; i += 2 * TILE) {
        const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(sums + i), splat(factor));
        const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(sums + i + TILE), splat(factor));
        store(to + i, _mm512_permutex2var_ps(a, first, b), first_lanes(head_dim - i));
        if (head_dim - i > TILE) {
            store(to + i + TILE, _mm512_permutex2var_ps(a, second, b), first_lanes(head_dim - i - TILE));
        }
    }
}

}  // namespace clif
