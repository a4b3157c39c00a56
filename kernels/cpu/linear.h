// Products of rows with packed matrices, written once for both levels. A kernel class computes sums of one block of
// rows and outputs; what is here decides which blocks, in which order, and whose adapter.
#pragma once
#include "parts.h"

namespace clif {

// linear_amx.cpp. Declared ahead of any target: GCC would take a declaration for another for a version of its own.
void low_by_amx(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots, uint16_t *low,
                int64_t rows, int thread, int threads);
void rest_by_amx(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                 const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int thread, int threads);
void gated_by_amx(const clif_linear &linear, int activation, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                  const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int thread, int threads);

}  // namespace clif

#include "widen.h"

namespace clif {

constexpr int64_t LINE = 64;         // bytes of a cache line
constexpr int64_t ROWS = 32;         // rows of a block
constexpr int64_t OUTS = 2 * PANEL;  // outputs of a block
constexpr int NO_SLOT = -1;

// One stretch of the inputs of a block: `tiles` times DEPTH numbers of each row, and the two panels that they meet.
struct Segment {
    const uint16_t *x;
    int64_t x_stride;
    Panel first, second;
    int64_t tiles;
    int form;
};

// Weights that the next product reads, fetched into the second cache while this one computes: `lines` of each of two
// panels for every tile of this one. Without it computing and reading take turns where there are more than a few rows:
// the processor's own prefetching does not look so far.
struct Ahead {
    const uint8_t *at = nullptr;
    int64_t panel_stride = 0, lines = 0;

    void step() {
        for (int64_t line = 0; line < lines; line++, at += LINE) {
            _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char *>(at + panel_stride), _MM_HINT_T1);
        }
    }
};

// A packed matrix, of which a block reads two panels: that of the outputs from `out` on, and another `apart` outputs
// behind it. form, groups: see widen.h.
struct Packed {
    const void *numbers;
    int64_t in, apart;
    int form = 16;
    Groups groups = {};

    int64_t tiles() const { return (in + DEPTH - 1) / DEPTH; }
    int64_t tile_bytes() const { return TILE * bits_of(form) / 8; }
    // Bytes from the first panel to the second.
    int64_t stride() const { return apart / PANEL * tiles() * tile_bytes(); }
    const uint8_t *at(int64_t out, int64_t tile) const {
        return static_cast<const uint8_t *>(numbers) + (out / PANEL * tiles() + tile) * tile_bytes();
    }
    // A panel, from a tile of the inputs on.
    Panel panel(int64_t out, int64_t tile) const {
        return {at(out, tile), groups.of_panel(out / PANEL, tiles()), tile};
    }
    Segment segment(const uint16_t *x, int64_t x_stride, int64_t out, int64_t tile, int64_t count) const {
        return {x, x_stride, panel(out, tile), panel(out + apart, tile), count, form};
    }
};

// Rows of a block whose inputs can be read in whole tiles. A row may end where its memory ends, so that the last inputs
// of each row are copied, with zeros behind them.
class Inputs {
   public:
    Inputs(const uint16_t *x, int64_t stride, int64_t in, int64_t rows)
        : x_(x), stride_(stride), tiles_(in / DEPTH), rest_(in % DEPTH) {
        if (rest_ == 0) return;
        const __mmask32 some = (1u << rest_) - 1;
        for (int64_t row = 0; row < rows; row++)
            _mm512_store_si512(tail_ + row * DEPTH, _mm512_maskz_loadu_epi16(some, x + row * stride + tiles_ * DEPTH));
    }

    // The segments of a product with outputs `out` of a matrix. Returns how many.
    int segments(const Packed &matrix, int64_t out, Segment *segments) const {
        int count = 0;
        if (tiles_) segments[count++] = matrix.segment(x_, stride_, out, 0, tiles_);
        if (rest_) segments[count++] = matrix.segment(tail_, DEPTH, out, tiles_, 1);
        return count;
    }

   private:
    alignas(64) uint16_t tail_[ROWS * DEPTH];
    const uint16_t *x_;
    int64_t stride_, tiles_, rest_;
};

// The adapters of a block's rows: one set of rows for each slot that occurs.
class Slots {
   public:
    // slots null: no row has any.
    Slots(const int32_t *slots, int64_t rows) : slots_(slots), left_(rows == ROWS ? ~0u : (1u << rows) - 1) {
        all_ = left_;
        if (!slots) left_ = 0;
        for (int64_t row = 0; slots && row < rows; row++)
            if (slots[row] < 0) left_ &= ~(1u << row);
    }

    // The next slot and its rows, as bits; false behind the last.
    bool next(int *slot, uint32_t *rows) {
        if (!left_) return false;
        *slot = slots_[__builtin_ctz(left_)];
        *rows = 0;
        for (uint32_t rest = left_; rest; rest &= rest - 1)
            if (slots_[__builtin_ctz(rest)] == *slot) *rows |= rest & -rest;
        left_ &= ~*rows;
        return true;
    }

    uint32_t all() const { return all_; }

   private:
    const int32_t *slots_;
    uint32_t left_, all_;
};

// Sums of a block, rows OUTS apart, as both kernels leave them.
struct Sums {
    alignas(64) float numbers[ROWS * OUTS];

    void take(const Sums &other, uint32_t rows) {
        for (; rows; rows &= rows - 1) {
            const int row = __builtin_ctz(rows);
            float *to = numbers + row * OUTS;
            _mm512_store_ps(to, _mm512_load_ps(other.numbers + row * OUTS));
            _mm512_store_ps(to + PANEL, _mm512_load_ps(other.numbers + row * OUTS + PANEL));
        }
    }

    // Multiply each row by the scales of its outputs: those of the first panel and those of the second.
    void scale(__m512 low, __m512 high) {
        for (float *row = numbers; row < numbers + ROWS * OUTS; row += OUTS) {
            _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), low));
            _mm512_store_ps(row + PANEL, _mm512_mul_ps(_mm512_load_ps(row + PANEL), high));
        }
    }

    // Add numbers of a bias to each row: those of the first panel and those of the second.
    void add(const uint16_t *bias, const uint16_t *second, int64_t outs) {
        const __m512 low = load(bias, first_lanes(outs));
        const __m512 high = load(second, outs > PANEL ? first_lanes(outs - PANEL) : 0);
        for (float *row = numbers; row < numbers + ROWS * OUTS; row += OUTS) {
            _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), low));
            _mm512_store_ps(row + PANEL, _mm512_add_ps(_mm512_load_ps(row + PANEL), high));
        }
    }

    // Round `outs` numbers of some rows and write them to y; zeros up to `width`.
    void round_to(uint16_t *y, int64_t y_stride, uint32_t rows, int64_t outs, int64_t width) const {
        const __mmask32 some = outs < OUTS ? (1u << outs) - 1 : ~0u, written = width < OUTS ? (1u << width) - 1 : ~0u;
        for (; rows; rows &= rows - 1) {
            const int row = __builtin_ctz(rows);
            const __m512 a = _mm512_load_ps(numbers + row * OUTS), b = _mm512_load_ps(numbers + row * OUTS + PANEL);
            const __m512i rounded = _mm512_maskz_mov_epi16(some, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            _mm512_mask_storeu_epi16(y + row * y_stride, written, rounded);
        }
    }

    // activation(first panel) * second, rounded where the gate of rounded numbers is.
    template <int ACTIVATION>
    void gate_to(uint16_t *y, int64_t y_stride, uint32_t rows) const {
        for (; rows; rows &= rows - 1) {
            const int row = __builtin_ctz(rows);
            const __m512 gate = rounded<uint16_t>(_mm512_load_ps(numbers + row * OUTS));
            const __m512 up = rounded<uint16_t>(_mm512_load_ps(numbers + row * OUTS + PANEL));
            store(y + row * y_stride, _mm512_mul_ps(rounded<uint16_t>(activated<ACTIVATION>(gate)), up));
        }
    }
};

// What becomes of a block's sums. Together: its outputs lie side by side, and are rounded.
struct Together {
    static constexpr int64_t STEP = OUTS;
    static int64_t width(const clif_linear &linear) { return linear.out; }
    static int64_t apart(const clif_linear &) { return PANEL; }
    static void write(const Sums &sums, uint16_t *y, int64_t y_stride, uint32_t rows, int64_t left) {
        sums.round_to(y, y_stride, rows, left, left);
    }
};

// Gated: gates in the first half of the outputs meet what they gate in the second half.
template <int ACTIVATION>
struct Gated {
    static constexpr int64_t STEP = PANEL;
    static int64_t width(const clif_linear &linear) { return linear.out / 2; }
    static int64_t apart(const clif_linear &linear) { return linear.out / 2; }
    static void write(const Sums &sums, uint16_t *y, int64_t y_stride, uint32_t rows, int64_t) {
        sums.gate_to<ACTIVATION>(y, y_stride, rows);
    }
};

// The weight of a layer, of which a block reads two panels.
template <class Outputs>
Packed weight_of(const clif_linear &linear) {
    return {linear.weight, linear.in, Outputs::apart(linear), form_of(linear), groups_of(linear)};
}

// What one thread computes: a rectangle of the result. Reading a panel from memory costs about as much as multiplying
// it with STREAM blocks of rows, so that rows are divided only where there are many.
struct Rectangle {
    Range rows, outs;
};

inline Rectangle rectangle(int64_t rows, int64_t row_unit, int64_t outs, int64_t out_unit, int thread, int threads) {
    constexpr int64_t STREAM = 4;
    const int64_t blocks = (rows + row_unit - 1) / row_unit, panels = (outs + out_unit - 1) / out_unit;
    int best = 1;
    int64_t least = INT64_MAX;
    for (int parts = 1; parts <= threads; parts++) {
        if (threads % parts) continue;
        const int64_t across = threads / parts;
        const int64_t cost = ((panels + across - 1) / across) * ((blocks + parts - 1) / parts + STREAM);
        if (cost < least) least = cost, best = parts;
    }
    const int across = threads / best;
    return {share(rows, thread / across, best, row_unit), share(outs, thread % across, across, out_unit)};
}

// low = x A_s^T for one block of rows and outputs.
template <class Kernel>
void low_block(Kernel &kernel, const clif_linear &linear, const Inputs &x, Slots slots, int64_t out, uint16_t *low,
               int64_t rows) {
    const int64_t left = linear.rank - out;
    // A second panel that is all padding is not read from memory: the first is taken twice, and its sums are left out.
    const int64_t apart = left > PANEL ? PANEL : 0;
    int slot;
    for (uint32_t members; slots.next(&slot, &members);) {
        Sums sums;
        Segment segments[2];
        const int count = x.segments({linear.a + slot * linear.a_stride, linear.in, apart}, out, segments);
        kernel.sum(segments, count, nullptr, sums.numbers, rows);
        sums.round_to(low + out, padded(linear.rank), members, left, OUTS);
    }
}

template <class Kernel>
void low_part(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots, uint16_t *low,
              int64_t rows, int thread, int threads) {
    const Rectangle mine = rectangle(rows, PANEL, linear.rank, OUTS, thread, threads);
    Kernel kernel;
    for (int64_t row = mine.rows.begin; row < mine.rows.end; row += ROWS) {
        const int64_t some = mine.rows.end - row < ROWS ? mine.rows.end - row : ROWS;
        const Inputs inputs(x + row * x_stride, x_stride, linear.in, some);
        const Slots members(slots + row, some);
        for (int64_t out = mine.outs.begin; out < mine.outs.end; out += OUTS)
            low_block(kernel, linear, inputs, members, out, low + row * padded(linear.rank), some);
    }
}

// Lines of a result that is larger than the caches would be waited for when they are written.
inline void fetch_to_write(const uint16_t *y) { __asm__ volatile("prefetchw %0" : : "m"(*y)); }

// y for one block of rows and outputs. The adapter's product goes on where the weight's ends, in the same sums. Rows of
// several slots have products of their own: a zero times a foreign factor that is not finite would not be zero.
template <class Outputs, class Kernel>
void rest_block(Kernel &kernel, const clif_linear &linear, const Inputs &x, Slots slots, const uint16_t *low,
                int64_t out, uint16_t *y, int64_t y_stride, int64_t rows, Ahead ahead) {
    const int64_t apart = Outputs::apart(linear);
    Sums sums;
    Segment segments[3];
    int count = x.segments(weight_of<Outputs>(linear), out, segments);
    const int64_t rank = padded(linear.rank);
    const auto adapter = [&](int slot) -> Segment {
        const Packed b{linear.b + slot * linear.b_stride, linear.rank, apart};
        return b.segment(low, rank, out, 0, rank / DEPTH);
    };
    int slot = NO_SLOT;
    uint32_t members = 0;
    // Scales by output are not the adapter's: its product waits until they are in the sums.
    const bool scaled = form_of(linear) == 8;
    const bool any = slots.next(&slot, &members), one = any && !scaled && members == slots.all();
    if (one) segments[count++] = adapter(slot);
    for (int64_t row = 0; row < rows; row++) fetch_to_write(y + out + row * y_stride);
    kernel.sum(segments, count, nullptr, sums.numbers, rows, ahead);
    if (scaled) sums.scale(groups_of(linear).scale(out / PANEL), groups_of(linear).scale((out + apart) / PANEL));
    for (bool more = any && !one; more; more = slots.next(&slot, &members)) {
        Sums with;
        const Segment factor = adapter(slot);
        kernel.sum(&factor, 1, sums.numbers, with.numbers, rows);
        sums.take(with, members);
    }
    const int64_t left = linear.out - out;
    if (linear.bias) sums.add(linear.bias + out, linear.bias + out + Outputs::apart(linear), left);
    Outputs::write(sums, y + out, y_stride, slots.all(), left);
}

// Which weights are fetched ahead: those of the next two panels, divided among the blocks of rows.
class Reading {
   public:
    Reading(const Packed &matrix, int64_t step, int64_t end, int64_t rows)
        : matrix_(matrix), step_(step), end_(end), blocks_((rows + ROWS - 1) / ROWS), few_(rows <= PANEL && matrix.form == 16) {}

    Ahead ahead(int64_t out, int64_t block) const {
        if (few_ || out + step_ >= end_) return {};
        const int64_t lines = (matrix_.tile_bytes() / LINE + blocks_ - 1) / blocks_;
        return {matrix_.at(out + step_, 0) + block * lines * LINE * matrix_.tiles(), matrix_.stride(), lines};
    }

   private:
    Packed matrix_;
    int64_t step_, end_, blocks_;
    bool few_;
};

template <class Outputs, class Kernel>
void rest_part(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots,
               const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int thread, int threads) {
    constexpr int64_t CACHED = 1 << 19;  // numbers of x that stay in the second cache while the panels pass by
    const Rectangle mine = rectangle(rows, ROWS, Outputs::width(linear), Outputs::STEP, thread, threads);
    const int64_t fit = CACHED / linear.in / ROWS * ROWS, chunk = fit < ROWS ? ROWS : fit;
    const Packed weight = weight_of<Outputs>(linear);
    if (linear.rank == 0) slots = nullptr;
    Kernel kernel;
    for (int64_t begin = mine.rows.begin; begin < mine.rows.end; begin += chunk) {
        const int64_t end = begin + chunk < mine.rows.end ? begin + chunk : mine.rows.end;
        const Reading reading(weight, Outputs::STEP, mine.outs.end, end - begin);
        for (int64_t out = mine.outs.begin; out < mine.outs.end; out += Outputs::STEP)
            for (int64_t row = begin; row < end; row += ROWS) {
                const int64_t some = end - row < ROWS ? end - row : ROWS;
                const Inputs inputs(x + row * x_stride, x_stride, linear.in, some);
                rest_block<Outputs>(kernel, linear, inputs, Slots(slots ? slots + row : nullptr, some),
                           slots ? low + row * padded(linear.rank) : nullptr, out, y + row * y_stride, y_stride, some,
                           reading.ahead(out, (row - begin) / ROWS));
            }
    }
}

template <class Kernel>
void gated_part(const clif_linear &linear, int activation, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int thread, int threads) {
    if (activation == CLIF_SILU) {
        rest_part<Gated<CLIF_SILU>, Kernel>(linear, x, x_stride, slots, low, y, y_stride, rows, thread, threads);
    } else {
        rest_part<Gated<CLIF_GELU>, Kernel>(linear, x, x_stride, slots, low, y, y_stride, rows, thread, threads);
    }
}

}  // namespace clif
