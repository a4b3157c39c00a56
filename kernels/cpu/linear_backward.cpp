// The backward of a linear layer with LoRA factors: W is read as it is and packed strip by strip on the way, which
// hides behind the products and takes no second copy of W.
//
// No result depends on the number of threads: each number is one thread's sum, over all rows or outputs in order.
//
// Sources: LoRA (Hu et al. 2021).
#include "panels.h"
#include "training.h"

namespace clif::training {
namespace {

// Rows and depth of a product's left side, and columns of its right one, that stay in a core's caches.
constexpr int64_t ROWS = 512, DEPTH = 640, STRIP = 32;

// What all threads see. low_grad [rows, rank], both padded to 32 with zeros: the gradient of x A^T.
struct Shared {
    Shared(const clif_learning &l, int64_t rows, Scratch &scratch)
        : rank16(padded16(l.rank)), rank32(padded(l.rank)), rows32(padded(rows)) {
        low_grad = scratch.take<uint16_t>(rows32 * rank32);
    }
    int64_t rank16, rank32, rows32;
    uint16_t *low_grad;
};

// A thread's own memory.
struct Own {
    Own(const clif_learning &l, const Shared &shared, int64_t rows, Scratch &scratch) {
        tail = scratch.take<uint16_t>(16 * l.out);
        panels = scratch.take<uint16_t>((DEPTH + shared.rank32) * STRIP);
        // For all columns: a team may turn out smaller than asked for.
        sums = scratch.take<float>((rows < ROWS ? padded16(rows) : ROWS) * l.in);
        if (l.rank == 0) return;
        b = scratch.take<uint16_t>(l.out * shared.rank16);
        columns = scratch.take<uint16_t>(shared.rows32 * STRIP);
        // A module's factor is read in whole tiles: there are rows behind the last, which mean nothing.
        low_t = scratch.take<uint16_t>((shared.rank16 + 16) * shared.rows32);
        low_grad_t = scratch.take<uint16_t>(shared.rank16 * shared.rows32);
        small = scratch.take<float>((shared.rank16 + 16) * STRIP);
    }
    uint16_t *tail, *panels, *b = nullptr, *columns = nullptr, *low_t = nullptr, *low_grad_t = nullptr;
    float *sums, *small = nullptr;
};

// Rows from `row` on, which fill no tile, with zeros behind them: [16, k].
void copy_tail(const uint16_t *a, int64_t stride, int64_t row, int64_t rows, int64_t k, uint16_t *tail) {
    for (int64_t i = 0; i < 16; i++) {
        if (row + i < rows)
            __builtin_memcpy(tail + i * k, a + (row + i) * stride, k * sizeof *a);
        else
            __builtin_memset(tail + i * k, 0, k * sizeof *a);
    }
}

// low_grad = scale * grad B, this thread's rows.
void low_gradient(const clif_learning &l, const Shared &shared, const Own &own, const uint16_t *grad, int64_t stride,
                  int64_t rows, const Tiles &tiles, int thread, int threads) {
    const Range mine = share(rows, thread, threads, 32);
    if (mine.begin == mine.end) return;
    const int64_t rank = shared.rank16, panel = l.out * 16;
    pack_rows(l.b, l.rank, l.out, l.rank, own.b);
    for (int64_t row = mine.begin; row < mine.end; row += 32) {
        const int64_t here = mine.end - row < 32 ? mine.end - row : 32, full = here / 16 * 16;
        if (full) multiply(tiles, grad + row * stride, stride, own.b, panel, own.small, rank, full, rank, l.out, false);
        if (full < here) {
            copy_tail(grad, stride, row + full, rows, l.out, own.tail);
            multiply(tiles, own.tail, l.out, own.b, panel, own.small + full * rank, rank, 16, rank, l.out, false);
        }
        for (int64_t i = 0; i < 32; i++)
            for (int64_t col = 0; col < shared.rank32; col += LANES) {
                const bool real = i < here && col < rank;
                const __m512 x = real ? _mm512_loadu_ps(own.small + i * rank + col) : _mm512_setzero_ps();
                store(shared.low_grad + (row + i) * shared.rank32 + col, _mm512_mul_ps(splat(l.scale), x));
            }
    }
}

// grad_x = grad W + low_grad A, this thread's columns.
void input_gradient(const clif_learning &l, const Shared &shared, const Own &own, const uint16_t *grad, int64_t stride,
                    uint16_t *grad_x, int64_t rows, const Tiles &tiles, int thread, int threads) {
    const Range mine = share(l.in, thread, threads, STRIP);
    const int64_t chunks = (l.out + DEPTH - 1) / DEPTH, step = padded((l.out + chunks - 1) / chunks);
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        const int64_t here = rows - begin < ROWS ? rows - begin : ROWS, full = here / 16 * 16;
        if (full < here) copy_tail(grad, stride, begin + full, rows, l.out, own.tail);
        for (int64_t depth = 0; depth < l.out; depth += step) {
            const int64_t deep = l.out - depth < step ? l.out - depth : step, panel = deep * 16;
            const uint16_t *left = grad + begin * stride + depth, *low = shared.low_grad + begin * shared.rank32;
            for (int64_t col = mine.begin; col < mine.end; col += STRIP) {
                float *sums = own.sums + (col - mine.begin) * padded16(here), *below = sums + full * STRIP;
                const bool more = depth > 0, last = depth + deep == l.out;
                pack_rows(l.weight + depth * l.in + col, l.in, deep, STRIP, own.panels);
                if (full) multiply(tiles, left, stride, own.panels, panel, sums, STRIP, full, STRIP, deep, more);
                if (full < here)
                    multiply(tiles, own.tail + depth, l.out, own.panels, panel, below, STRIP, 16, STRIP, deep, more);
                if (!last) continue;
                if (l.rank) {
                    pack_rows(l.a + col, l.in, l.rank, STRIP, own.panels);
                    multiply(tiles, low, shared.rank32, own.panels, shared.rank32 * 16, sums, STRIP, padded16(here),
                             STRIP, shared.rank32, true);
                }
                for (int64_t i = 0; i < here; i++)
                    _mm512_storeu_si512(grad_x + (begin + i) * l.in + col, round32(sums + i * STRIP));
            }
        }
    }
}

// gradient [rank, in] += low_grad^T x, this thread's columns.
void a_gradient(const clif_learning &l, const Shared &shared, const Own &own, const uint16_t *x, int64_t stride,
                int64_t rows, float *gradient, const Tiles &tiles, int thread, int threads) {
    const Range mine = share(l.in, thread, threads, STRIP);
    if (mine.begin == mine.end) return;
    transpose(shared.low_grad, shared.rank32, rows, l.rank, own.low_grad_t);
    for (int64_t col = mine.begin; col < mine.end; col += STRIP) {
        pack_rows(x + col, stride, rows, STRIP, own.columns);
        multiply(tiles, own.low_grad_t, shared.rows32, own.columns, shared.rows32 * 16, own.small, STRIP, shared.rank16,
                 STRIP, shared.rows32, false);
        for (int64_t i = 0; i < l.rank; i++)
            for (int64_t j = 0; j < STRIP; j += LANES) {
                float *to = gradient + i * l.in + col + j;
                store(to, _mm512_add_ps(load(to), load(own.small + i * STRIP + j)));
            }
    }
}

// gradient [outputs of all modules, r] += scale * grad^T low, each module's own columns of low; this thread's part.
void b_gradient(const clif_learning &l, const Shared &shared, const Own &own, const uint16_t *grad, int64_t stride,
                const uint16_t *low, int64_t low_stride, int64_t rows, float *gradient, const Tiles &tiles, int thread,
                int threads) {
    transpose(low, low_stride, rows, l.rank, own.low_t);
    for (int64_t member = 0; member < l.members; member++) {
        const int64_t start = l.outputs[2 * member], stop = l.outputs[2 * member + 1];
        const uint16_t *left = own.low_t + member * l.r * shared.rows32;
        const Range mine = share(stop - start, thread, threads, STRIP);
        for (int64_t col = mine.begin; col < mine.end; col += STRIP) {
            const int64_t wide = mine.end - col < STRIP ? mine.end - col : STRIP;
            pack_rows(grad + start + col, stride, rows, wide, own.columns);
            multiply(tiles, left, shared.rows32, own.columns, shared.rows32 * 16, own.small, STRIP, padded16(l.r),
                     padded16(wide), shared.rows32, false);
            float *to = gradient + col * l.r;
            for (int64_t j = 0; j < wide; j++)
                for (int64_t i = 0; i < l.r; i++) to[j * l.r + i] += l.scale * own.small[i * STRIP + j];
        }
        gradient += (stop - start) * l.r;
    }
}

int64_t own_bytes(const clif_learning &l, int64_t rows) {
    Scratch shared(nullptr), own(nullptr);
    Own(l, Shared(l, rows, shared), rows, own);
    return own.bytes();
}

}  // namespace
}  // namespace clif::training

using namespace clif;
using namespace clif::training;

CLIF_API int64_t clif_linear_backward_scratch(const clif_learning *linear, int64_t rows, int threads) {
    Scratch shared(nullptr);
    Shared(*linear, rows, shared);
    return shared.bytes() + threads * own_bytes(*linear, rows);
}

CLIF_API void clif_linear_backward(const clif_learning *linear, const uint16_t *grad, int64_t grad_stride,
                                   const uint16_t *x, int64_t x_stride, const uint16_t *low, int64_t low_stride,
                                   uint16_t *grad_x, float *gradient_a, float *gradient_b, int64_t rows, void *scratch,
                                   int level, int threads) {
    const clif_learning &l = *linear;
    Scratch all(scratch);
    const Shared shared(l, rows, all);
    const int64_t each = own_bytes(l, rows);
    char *first = all.take<char>(0);
    on_threads(threads, [&](int thread, int team) {
        Scratch mine(first + thread * each);
        const Own own(l, shared, rows, mine);
        const Tiles tiles(level);
        if (l.rank) {
            low_gradient(l, shared, own, grad, grad_stride, rows, tiles, thread, team);
#pragma omp barrier
        }
        if (grad_x) input_gradient(l, shared, own, grad, grad_stride, grad_x, rows, tiles, thread, team);
        if (l.rank == 0) return;
        a_gradient(l, shared, own, x, x_stride, rows, gradient_a, tiles, thread, team);
        b_gradient(l, shared, own, grad, grad_stride, low, low_stride, rows, gradient_b, tiles, thread, team);
    });
}
