// The C interface of what training computes beside the forward of serving: clif_cpu.h continued. All in bfloat16, with
// sums in float32. scratch: memory of the caller, from a boundary of cache lines on; what is in it does not matter.
#pragma once
#include "clif_cpu.h"

// A frozen linear layer W [out, in] and the LoRA factors that learn beside it: A [rank, in], B [out, rank] of `members`
// adapted modules of rank r each. outputs [members, 2]: the first output of each module, and the one behind its last.
// in and out are multiples of 32. rank 0: no factors.
typedef struct {
    int64_t in, out;
    const uint16_t *weight;
    int64_t rank, r, members;
    const int64_t *outputs;
    const uint16_t *a, *b;
    float scale;
} clif_learning;

CLIF_API int64_t clif_linear_backward_scratch(const clif_learning *linear, int64_t rows, int threads);
// Given grad [rows, out] of y = x W^T + scale * low B^T with low = x A^T [rows, rank]: grad_x [rows, in] (null: not
// wanted); added to gradient_a [rank, in] and gradient_b [outputs of all modules, r]. Strides count numbers.
CLIF_API void clif_linear_backward(const clif_learning *linear, const uint16_t *grad, int64_t grad_stride,
                                   const uint16_t *x, int64_t x_stride, const uint16_t *low, int64_t low_stride,
                                   uint16_t *grad_x, float *gradient_a, float *gradient_b, int64_t rows, void *scratch,
                                   int level, int threads);

// Sequences one after the other, rows ends[i] to ends[i + 1] each: a token sees those of its sequence up to itself.
// Rows of query, key and value lie `stride` numbers apart, heads head_dim.
typedef struct {
    int64_t heads, kv_heads, head_dim, sequences;
    const int32_t *ends;
    const uint16_t *query, *key, *value;
    int64_t stride;
    clif_scores scores;
} clif_sequences;

CLIF_API int64_t clif_causal_scratch(const clif_sequences *of, int backward, int threads);
// out [rows, heads * head_dim]; log_sums [heads, rows]: of e^score of each row, its head's sink among them, which the
// backward reads.
CLIF_API void clif_causal(const clif_sequences *of, uint16_t *out, float *log_sums, void *scratch, int level,
                          int threads);
// Given grad [rows, heads * head_dim]: the gradients of query, key and value, rows grad_stride numbers apart.
CLIF_API void clif_causal_backward(const clif_sequences *of, const uint16_t *out, const float *log_sums,
                                   const uint16_t *grad, uint16_t *grad_query, uint16_t *grad_key, uint16_t *grad_value,
                                   int64_t grad_stride, void *scratch, int level, int threads);

// Given grad [rows, width] of x / rms(x) * weight: that of x, plus grad_sum, of what else reads x (null: nothing).
CLIF_API void clif_rms_norm_backward(const uint16_t *x, const clif_norm *norm, const uint16_t *grad,
                                     const uint16_t *grad_sum, uint16_t *grad_x, int64_t rows, int64_t width,
                                     int threads);
// Given grad [rows, inner] of activation(gate) * up: that of wide [rows, gate | up].
CLIF_API void clif_gate_backward(int activation, const uint16_t *wide, const uint16_t *grad, uint16_t *grad_wide,
                                 int64_t rows, int64_t inner, int threads);
// The first `heads` heads of each row of grad [rows, all_heads * head_dim], turned back in place. angles [rows, 2,
// rotary_dim]: as clif_rotate has them.
CLIF_API void clif_rotate_backward(uint16_t *grad, const uint16_t *angles, int64_t heads, int64_t all_heads,
                                   int64_t head_dim, int64_t rotary_dim, int64_t rows, int threads);
// losses [rows]: cross-entropy in nats of targets [rows]. divisor: above 0, logits [rows, width] become their gradient of
// (summed loss / divisor).
CLIF_API void clif_cross_entropy(uint16_t *logits, const int64_t *targets, float divisor, double *losses, int64_t rows,
                                 int64_t width, int threads);
