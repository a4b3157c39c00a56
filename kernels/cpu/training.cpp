// Backwards of a layer's parts between its products, and the loss, in bfloat16 with sums in float32.
//
// Sources: rotary embeddings (Su et al. 2021); RMSNorm (Zhang and Sennrich 2019); SwiGLU (Shazeer 2020).
#include "training.h"

#include <math.h>

#include "parts.h"
#include "vector.h"

namespace clif::training {
namespace {

// With n = x r, r = 1 / rms(x), and g = grad * weight: r (g - n mean(g n)) + grad_sum.
template <class W>
void norm_row(const uint16_t *x, const W *weight, float eps, const uint16_t *grad, const uint16_t *grad_sum,
              uint16_t *grad_x, int64_t width) {
    __m512 squares = _mm512_setzero_ps(), dots = _mm512_setzero_ps();
    for (int64_t j = 0; j < width; j += LANES) {
        const __mmask16 mask = first_lanes(width - j);
        const __m512 v = load(x + j, mask);
        squares = _mm512_fmadd_ps(v, v, squares);
        dots = _mm512_fmadd_ps(v, _mm512_mul_ps(load(grad + j, mask), load(weight + j, mask)), dots);
    }
    const float n = static_cast<float>(width), r = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / n + eps);
    const __m512 scale = splat(r), less = splat(_mm512_reduce_add_ps(dots) * r * r * r / n);
    for (int64_t j = 0; j < width; j += LANES) {
        const __mmask16 mask = first_lanes(width - j);
        const __m512 g = _mm512_mul_ps(_mm512_mul_ps(load(grad + j, mask), load(weight + j, mask)), scale);
        __m512 sum = _mm512_fnmadd_ps(load(x + j, mask), less, g);
        if (grad_sum) sum = _mm512_add_ps(sum, load(grad_sum + j, mask));
        store(grad_x + j, sum, mask);
    }
}

// Both activations are x / (1 + e^-y): y and its slope in x.
template <int ACTIVATION>
void inside(__m512 x, __m512 *y, __m512 *slope) {
    if (ACTIVATION == CLIF_SILU) {
        *y = x, *slope = splat(1.0f);
        return;
    }
    const __m512 rate = splat(GELU_RATE), cube = _mm512_mul_ps(_mm512_mul_ps(x, x), splat(GELU_CUBE));
    *y = _mm512_mul_ps(rate, _mm512_fmadd_ps(cube, x, x));
    *slope = _mm512_mul_ps(rate, _mm512_fmadd_ps(cube, splat(3.0f), splat(1.0f)));
}

template <int ACTIVATION>
void gate_row(const uint16_t *wide, const uint16_t *grad, uint16_t *grad_wide, int64_t inner) {
    const __m512 one = splat(1.0f);
    for (int64_t j = 0; j < inner; j += LANES) {
        const __mmask16 mask = first_lanes(inner - j);
        const __m512 x = load(wide + j, mask), up = load(wide + inner + j, mask), g = load(grad + j, mask);
        __m512 y, inner_slope;
        inside<ACTIVATION>(x, &y, &inner_slope);
        const __m512 gate = _mm512_div_ps(one, _mm512_add_ps(one, exp2<uint16_t>(_mm512_mul_ps(y, splat(-1.44269504f)))));
        const __m512 value = _mm512_mul_ps(x, gate);
        store(grad_wide + inner + j, _mm512_mul_ps(g, value), mask);
        const __m512 curved = ACTIVATION == CLIF_SILU ? value : _mm512_mul_ps(value, inner_slope);
        const __m512 slope = _mm512_fmadd_ps(curved, _mm512_sub_ps(one, gate), gate);
        store(grad_wide + j, _mm512_mul_ps(_mm512_mul_ps(g, up), slope), mask);
    }
}

// The transpose of the rotation, in place.
void turn_back(uint16_t *head, const uint16_t *angles, int64_t rotary_dim) {
    const int64_t half = rotary_dim / 2;
    const uint16_t *cos = angles, *sin = angles + rotary_dim;
    for (int64_t j = 0; j < half; j += LANES) {
        const __mmask16 mask = first_lanes(half - j);
        const __m512 a = load(head + j, mask), b = load(head + half + j, mask);
        const __m512 to_a = _mm512_mul_ps(b, load(sin + half + j, mask));
        const __m512 to_b = _mm512_mul_ps(a, load(sin + j, mask));
        store(head + j, _mm512_fmadd_ps(a, load(cos + j, mask), to_a), mask);
        store(head + half + j, _mm512_fmadd_ps(b, load(cos + half + j, mask), to_b), mask);
    }
}

// The log of the sum of e^x over a row.
float log_sum(const uint16_t *row, int64_t width) {
    __m512 most = splat(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t j = 0; j < width; j += LANES) {
        const __mmask16 mask = first_lanes(width - j);
        most = _mm512_mask_max_ps(most, mask, most, load(row + j, mask));
    }
    const float top = _mm512_reduce_max_ps(most);
    for (int64_t j = 0; j < width; j += LANES) {
        const __mmask16 mask = first_lanes(width - j);
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(load(row + j, mask), splat(top)), splat(1.44269504f));
        total = _mm512_mask_add_ps(total, mask, total, exp2<float>(x));
    }
    return top + logf(_mm512_reduce_add_ps(total));
}

// The cross-entropy of a row; divisor above 0: the row becomes its gradient / divisor.
double row_loss(uint16_t *row, int64_t width, int64_t target, float divisor) {
    const float all = log_sum(row, width), wanted = widen(row[target]);
    const double loss = static_cast<double>(all) - wanted;
    if (!(divisor > 0)) return loss;
    const __m512 share = splat(1.0f / divisor);
    for (int64_t j = 0; j < width; j += LANES) {
        const __mmask16 mask = first_lanes(width - j);
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(load(row + j, mask), splat(all)), splat(1.44269504f));
        store(row + j, _mm512_mul_ps(exp2<uint16_t>(x), share), mask);
    }
    row[target] = narrow((expf(wanted - all) - 1.0f) / divisor);
    return loss;
}

// Run part(row) for all rows, each by one thread.
template <class Part>
void on_rows(int64_t rows, int threads, Part part) {
    on_threads(threads, [&](int thread, int team) {
        const Range mine = share(rows, thread, team);
        for (int64_t row = mine.begin; row < mine.end; row++) part(row);
    });
}

}  // namespace
}  // namespace clif::training

using namespace clif;
using namespace clif::training;

CLIF_API void clif_rms_norm_backward(const uint16_t *x, const clif_norm *norm, const uint16_t *grad,
                                     const uint16_t *grad_sum, uint16_t *grad_x, int64_t rows, int64_t width,
                                     int threads) {
    on_rows(rows, threads, [&](int64_t row) {
        const int64_t at = row * width;
        const uint16_t *beside = grad_sum ? grad_sum + at : nullptr;
        if (norm->wide) {
            const float *weight = static_cast<const float *>(norm->weight);
            norm_row(x + at, weight, norm->eps, grad + at, beside, grad_x + at, width);
        } else {
            const uint16_t *weight = static_cast<const uint16_t *>(norm->weight);
            norm_row(x + at, weight, norm->eps, grad + at, beside, grad_x + at, width);
        }
    });
}

CLIF_API void clif_gate_backward(int activation, const uint16_t *wide, const uint16_t *grad, uint16_t *grad_wide,
                                 int64_t rows, int64_t inner, int threads) {
    const auto backward = activation == CLIF_SILU ? gate_row<CLIF_SILU> : gate_row<CLIF_GELU>;
    on_rows(rows, threads, [&](int64_t row) {
        backward(wide + row * 2 * inner, grad + row * inner, grad_wide + row * 2 * inner, inner);
    });
}

CLIF_API void clif_rotate_backward(uint16_t *grad, const uint16_t *angles, int64_t heads, int64_t all_heads,
                                   int64_t head_dim, int64_t rotary_dim, int64_t rows, int threads) {
    on_rows(rows, threads, [&](int64_t row) {
        for (int64_t head = 0; head < heads; head++)
            turn_back(grad + (row * all_heads + head) * head_dim, angles + row * 2 * rotary_dim, rotary_dim);
    });
}

CLIF_API void clif_cross_entropy(uint16_t *logits, const int64_t *targets, float divisor, double *losses, int64_t rows,
                                 int64_t width, int threads) {
    on_rows(rows, threads, [&](int64_t row) {
        losses[row] = row_loss(logits + row * width, width, targets[row], divisor);
    });
}
