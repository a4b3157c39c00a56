// Products by AMX: two by two tiles of sums, each of 16 rows and 16 outputs.
#include "linear.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16")

namespace clif {
namespace {

// As the instruction reads it: palette 1, then bytes of a row and rows of each tile.
struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 have sums (0 and 1 of the upper rows), 4 and 5 rows of x, 6 and 7 a panel's weights each.
class Amx {
   public:
    ~Amx() {
        if (rows_) _tile_release();
    }

    // sums = start (or zero) + the segments' products, in order.
    void sum(const Segment *segments, int count, const float *start, float *sums, int64_t rows, Ahead ahead = {}) {
        configure(rows);
        publish(start);
        if (rows > PANEL)
            both_halves(segments, count, start, sums, ahead);
        else
            upper_half(segments, count, start, sums, ahead);
    }

   private:
    static constexpr int64_t ROW_BYTES = OUTS * sizeof(float), LOWER = PANEL * OUTS;

    void configure(int64_t rows) {
        if (rows == rows_) return;
        rows_ = rows;
        const uint8_t upper = rows < PANEL ? rows : PANEL, lower = rows > PANEL ? rows - PANEL : 1;
        Configuration c;
        for (int tile = 0; tile < 8; tile++) c.row_bytes[tile] = 64;
        c.rows[0] = c.rows[1] = c.rows[4] = upper;
        c.rows[2] = c.rows[3] = c.rows[5] = lower;
        c.rows[6] = c.rows[7] = PANEL;
        publish(&c);
        _tile_loadconfig(&c);
    }

    void both_halves(const Segment *segments, int count, const float *start, float *sums, Ahead ahead) {
        if (start) {
            _tile_loadd(0, start, ROW_BYTES);
            _tile_loadd(1, start + PANEL, ROW_BYTES);
            _tile_loadd(2, start + LOWER, ROW_BYTES);
            _tile_loadd(3, start + LOWER + PANEL, ROW_BYTES);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (const Segment *s = segments; s < segments + count; s++) of_form<true>(*s, ahead);
        _tile_stored(0, sums, ROW_BYTES);
        _tile_stored(1, sums + PANEL, ROW_BYTES);
        _tile_stored(2, sums + LOWER, ROW_BYTES);
        _tile_stored(3, sums + LOWER + PANEL, ROW_BYTES);
    }

    void upper_half(const Segment *segments, int count, const float *start, float *sums, Ahead ahead) {
        if (start) {
            _tile_loadd(0, start, ROW_BYTES);
            _tile_loadd(1, start + PANEL, ROW_BYTES);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        for (const Segment *s = segments; s < segments + count; s++) of_form<false>(*s, ahead);
        _tile_stored(0, sums, ROW_BYTES);
        _tile_stored(1, sums + PANEL, ROW_BYTES);
    }

    template <bool LOWER>
    void of_form(const Segment &s, Ahead &ahead) {
        if (s.form == 16) add<16, LOWER>(s, ahead);
        if (s.form == 8) add<8, LOWER>(s, ahead);
        if (s.form == GROUPED) add<GROUPED, LOWER>(s, ahead);
        if (s.form == 4) add<4, LOWER>(s, ahead);
    }

    // What is widened lies in a ring, a tile ahead of the one that is multiplied: both go on at the same time.
    template <int FORM, bool LOWER>
    void add(const Segment &s, Ahead &ahead) {
        const int64_t bytes = s.x_stride * sizeof(uint16_t);
        const uint16_t *x = s.x, *lower = x + PANEL * s.x_stride;
        const uint16_t *next = tile_of<FORM>(s.first, 0, ring_), *next1 = tile_of<FORM>(s.second, 0, ring_ + TILE);
        for (int64_t k = 0; k < s.tiles; k++) {
            ahead.step();
            const uint16_t *w = next, *w1 = next1;
            if (FORM == 16 || k + 1 < s.tiles) {
                uint16_t *room = ring_ + (k + 1) % RING * 2 * TILE;
                next = tile_of<FORM>(s.first, k + 1, room), next1 = tile_of<FORM>(s.second, k + 1, room + TILE);
                if (FORM != 16) publish(ring_);
            }
            _tile_loadd(6, w, 64);
            _tile_loadd(4, x + k * DEPTH, bytes);
            _tile_loadd(7, w1, 64);
            if (LOWER) _tile_loadd(5, lower + k * DEPTH, bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (LOWER) _tile_dpbf16ps(2, 5, 6);
            if (LOWER) _tile_dpbf16ps(3, 5, 7);
        }
    }

    static constexpr int64_t RING = 4;
    alignas(64) uint16_t ring_[RING * 2 * TILE];
    int64_t rows_ = 0;
};

}  // namespace

void low_by_amx(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots, uint16_t *low,
                int64_t rows, int thread, int threads) {
    low_part<Amx>(linear, x, x_stride, slots, low, rows, thread, threads);
}

void rest_by_amx(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                 const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int thread, int threads) {
    rest_part<Together, Amx>(linear, x, x_stride, slots, low, y, y_stride, rows, thread, threads);
}

void gated_by_amx(const clif_linear &linear, int activation, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                  const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int thread, int threads) {
    gated_part<Amx>(linear, activation, x, x_stride, slots, low, y, y_stride, rows, thread, threads);
}

}  // namespace clif
