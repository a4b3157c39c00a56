// Products with frozen weights and their adapters: packing, the kernel for AVX512, and the choice between the levels.
#include "linear.h"

namespace clif {
namespace {

// Eight rows times two panels of sums in registers; a pair of inputs is broadcast to all outputs.
class Avx512 {
   public:
    void sum(const Segment *segments, int count, const float *start, float *sums, int64_t rows, Ahead = {}) {
        for (int64_t row = 0; row < rows; row += GROUP) {
            const float *from = start ? start + row * OUTS : nullptr;
            switch (rows - row) {
                case 1: group<1>(segments, count, row, from, sums); break;
                case 2: group<2>(segments, count, row, from, sums); break;
                case 3: group<3>(segments, count, row, from, sums); break;
                case 4: group<4>(segments, count, row, from, sums); break;
                case 5: group<5>(segments, count, row, from, sums); break;
                case 6: group<6>(segments, count, row, from, sums); break;
                case 7: group<7>(segments, count, row, from, sums); break;
                default: group<GROUP>(segments, count, row, from, sums);
            }
        }
    }

   private:
    static constexpr int GROUP = 8;

    template <int N>
    static void group(const Segment *segments, int count, int64_t row, const float *start, float *sums) {
        __m512 low[N], high[N];
        for (int i = 0; i < N; i++) {
            low[i] = start ? _mm512_load_ps(start + i * OUTS) : _mm512_setzero_ps();
            high[i] = start ? _mm512_load_ps(start + i * OUTS + PANEL) : _mm512_setzero_ps();
        }
        for (const Segment *s = segments; s < segments + count; s++) {
            if (s->form == 16) add<16, N>(*s, row, low, high);
            if (s->form == 8) add<8, N>(*s, row, low, high);
            if (s->form == GROUPED) add<GROUPED, N>(*s, row, low, high);
            if (s->form == 4) add<4, N>(*s, row, low, high);
        }
        for (int i = 0; i < N; i++) {
            _mm512_store_ps(sums + (row + i) * OUTS, low[i]);
            _mm512_store_ps(sums + (row + i) * OUTS + PANEL, high[i]);
        }
    }

    template <int FORM, int N>
    static void add(const Segment &s, int64_t row, __m512 *low, __m512 *high) {
        alignas(64) uint16_t room[FORM == 16 ? 1 : 2 * TILE];
        const uint16_t *x = s.x + row * s.x_stride;
        for (int64_t k = 0; k < s.tiles; k++, x += DEPTH) {
            const uint16_t *w = tile_of<FORM>(s.first, k, room);
            const uint16_t *w1 = tile_of<FORM>(s.second, k, FORM == 16 ? room : room + TILE);
            for (int64_t pair = 0; pair < DEPTH / 2; pair++) {
                const __m512bh a = (__m512bh)_mm512_load_si512(w + pair * 2 * PANEL);
                const __m512bh b = (__m512bh)_mm512_load_si512(w1 + pair * 2 * PANEL);
                for (int i = 0; i < N; i++) {
                    int both;
                    __builtin_memcpy(&both, x + i * s.x_stride + 2 * pair, sizeof(both));
                    const __m512bh xs = (__m512bh)_mm512_set1_epi32(both);
                    low[i] = _mm512_dpbf16_ps(low[i], xs, a);
                    high[i] = _mm512_dpbf16_ps(high[i], xs, b);
                }
            }
        }
    }
};

}  // namespace

void linear_low(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots, uint16_t *low,
                int64_t rows, int level, int thread, int threads) {
    if (linear.rank == 0 || !slots) return;
    if (level == CLIF_AMX)
        low_by_amx(linear, x, x_stride, slots, low, rows, thread, threads);
    else
        low_part<Avx512>(linear, x, x_stride, slots, low, rows, thread, threads);
}

void linear_rest(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                 const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int level, int thread, int threads) {
    if (level == CLIF_AMX)
        rest_by_amx(linear, x, x_stride, slots, low, y, y_stride, rows, thread, threads);
    else
        rest_part<Together, Avx512>(linear, x, x_stride, slots, low, y, y_stride, rows, thread, threads);
}

bool gates_meet(const clif_linear &linear) { return linear.out % OUTS == 0; }

void linear_gated(const clif_linear &linear, int activation, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                  const uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int level, int thread,
                  int threads) {
    if (level == CLIF_AMX)
        gated_by_amx(linear, activation, x, x_stride, slots, low, y, y_stride, rows, thread, threads);
    else
        gated_part<Avx512>(linear, activation, x, x_stride, slots, low, y, y_stride, rows, thread, threads);
}

}  // namespace clif

int64_t clif_packed_size(int64_t out, int64_t in) { return clif::padded(out) * clif::padded(in); }

namespace {

// low, then rest(thread, threads), which reads it.
template <class Rest>
void forward(const clif_linear &linear, const uint16_t *x, int64_t x_stride, const int32_t *slots, uint16_t *low,
             int64_t rows, int level, int threads, Rest rest) {
    const bool adapters = linear.rank > 0 && slots;
    clif::on_threads(threads, [&](int thread, int of) {
        if (adapters) {
            clif::linear_low(linear, x, x_stride, slots, low, rows, level, thread, of);
            if (of > 1) {
#pragma omp barrier
            }
        }
        rest(thread, of);
    });
}

}  // namespace

void clif_linear_forward(const clif_linear *linear, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                         uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int level, int threads) {
    forward(*linear, x, x_stride, slots, low, rows, level, threads, [&](int thread, int of) {
        clif::linear_rest(*linear, x, x_stride, slots, low, y, y_stride, rows, level, thread, of);
    });
}

void clif_linear_gated(const clif_linear *linear, int activation, const uint16_t *x, int64_t x_stride,
                       const int32_t *slots, uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int level, int threads) {
    forward(*linear, x, x_stride, slots, low, rows, level, threads, [&](int thread, int of) {
        clif::linear_gated(*linear, activation, x, x_stride, slots, low, y, y_stride, rows, level, thread, of);
    });
}
