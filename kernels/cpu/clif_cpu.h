// The C interface of CLIF's kernels for CPUs. Python calls it through ctypes (library.py), without torch's headers.
//
// Invariants: nothing is allocated or kept between calls; no result depends on the number of threads or on the other
// rows of a batch; a function that is told to use n threads opens one parallel region of n threads.
// Matrices are row-major and contiguous unless a stride, in numbers, is given. bfloat16 numbers travel as uint16_t.
#pragma once
#include <stdint.h>

#define CLIF_API extern "C" __attribute__((visibility("default")))

// Types of numbers.
enum { CLIF_FLOAT32 = 0, CLIF_BFLOAT16 = 1 };
// What a machine has: nothing that these kernels need; AVX512 with bfloat16; AMX with bfloat16 besides.
enum { CLIF_NONE = 0, CLIF_AVX512 = 1, CLIF_AMX = 2 };

// The largest of the levels above that this machine and its kernel allow. The first call asks for AMX's registers.
CLIF_API int clif_level(void);

// The interface that the library was built with: see interface.py.
CLIF_API const char *clif_interface(void);

// ---- products (linear.cpp), bfloat16 with sums in float32 ----

// A frozen weight W [out, in], as clif_pack lays it out, its bias [out] or null, and the LoRA factors of its slots.
// rank: rows of A (of all adapted members together); 0: no adapters. Slot s has its packed A [rank, in] at
// a + s * a_stride and its packed B [out, rank], which holds scale * B, at b + s * b_stride; strides in numbers.
// bits: of a number of W, padded as W is. 16: bfloat16, packed by clif_pack. 8: whole numbers [out / 16][in / 32][16 pairs
// of inputs][2][16 outputs]. 4: [out / 16][in / 32][2][2 halves of 16 outputs][8 outputs][2][8 pairs of inputs], from 0
// to 15. scales: [out / 16][groups][16], a group being 2^group_shift tiles of 32 inputs, or half a tile (-1); least: as
// many least numbers, of type CLIF_INT8 zero points, or null: then zero is 8 in 4 bits and 0 in 8. A number stands for
// number * scale + least, or for (number - zero point) * scale. In 8 bits with CLIF_BY_OUTPUT for a shift and no least,
// scales are left to the sums. Factors are bfloat16.
#define CLIF_BY_OUTPUT 62
enum { CLIF_FLOAT16 = 2, CLIF_INT8 = 3 };
typedef struct {
    int64_t in, out;
    const void *weight;
    const uint16_t *bias;
    int64_t rank;
    const uint16_t *a, *b;
    int64_t a_stride, b_stride;
    int64_t bits;
    const void *scales, *least;
    int64_t scale_type, least_type, group_shift;
} clif_linear;

// Numbers that a packed matrix [out, in] takes: outputs padded to 32, inputs to 32, with zeros.
CLIF_API int64_t clif_packed_size(int64_t out, int64_t in);
// Lay a matrix [out, in] with rows row_stride apart out as [out / 16][in / 32][16 pairs of inputs][16 outputs][2], each
// number multiplied by scale and rounded once.
CLIF_API void clif_pack(const uint16_t *matrix, int64_t out, int64_t in, int64_t row_stride, float scale,
                        uint16_t *packed);

// dense [out padded to 32, tiles * 32] = columns of a W of 8 or 4 bits, from tile `first` of the inputs on, in bfloat16.
CLIF_API void clif_widen(const clif_linear *linear, int64_t first, int64_t tiles, uint16_t *dense, int threads);

// y [rows, out] = x [rows, in] W^T + bias + (x A_s^T) B_s^T, s = slots[row], -1 for none. slots: null for none at all.
// low: scratch for rows * padded rank numbers, null if rank is 0. level: CLIF_AVX512 or CLIF_AMX.
CLIF_API void clif_linear_forward(const clif_linear *linear, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                                  uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int level, int threads);

// y [rows, out / 2] = activation(first half) * second half of what clif_linear_forward computes, rounded as by clif_gate;
// each half a multiple of 16 outputs.
CLIF_API void clif_linear_gated(const clif_linear *linear, int activation, const uint16_t *x, int64_t x_stride, const int32_t *slots,
                                 uint16_t *low, uint16_t *y, int64_t y_stride, int64_t rows, int level, int threads);

// ---- parts between products (elementwise.cpp) ----

// RMSNorm. weight: of the rows' type, and what it multiplies is rounded before, as transformers' norm of Llama does;
// wide: float32, and only the product is rounded, as Gemma's does. weight null: there is no norm.
typedef struct {
    const void *weight;
    float eps;
    int wide;
} clif_norm;

// sum [rows, width] = hidden + added (null: hidden alone), which may be the same memory; out = sum / rms(sum) * weight.
// Sums of squares in float32.
CLIF_API void clif_rms_norm(int type, const void *hidden, const void *added, const clif_norm *norm, void *sum, void *out,
                            int64_t rows, int64_t width, int threads);

// How heads lie in a row of the merged projection: query heads, KV heads of keys, as many of values. rotary_dim: numbers
// at the front of each head that are rotated. q_norm, k_norm: of each head.
typedef struct {
    int64_t heads, kv_heads, head_dim, rotary_dim;
    clif_norm q_norm, k_norm;
} clif_heads;

// Rotate the heads of qkv [rows, (heads + 2 kv_heads) * head_dim] in place and write keys and values to the cache [2 * kv_heads,
// cache_slots, head_dim], keys first, at slots [rows]; cache null: nowhere.
// angles [positions, 2, rotary_dim]: cosines and sines, the sines negative in their first half; positions [rows].
CLIF_API void clif_rotate(int type, const clif_heads *heads, void *qkv, const void *angles, const int64_t *positions,
                          void *cache, int64_t cache_slots, const int64_t *slots, int64_t rows, int threads);

// Activations of gates: x / (1 + e^-x), and GELU with tanh.
enum { CLIF_SILU = 0, CLIF_GELU = 1 };
// out [rows, inner] = activation(gate) * up, of wide [rows, gate | up].
CLIF_API void clif_gate(int type, int activation, const void *wide, void *out, int64_t rows, int64_t inner, int threads);

// best [rows]: the first index of the largest number of each row of logits [rows, width]; -1 where a row has a NaN or its largest is
// not finite.
CLIF_API void clif_argmax(int type, const void *logits, int64_t *best, int64_t rows, int64_t width, int threads);

// ---- attention (attention.cpp) ----

// The rows of a step and their sequences. sequence [rows]: index of a row's sequence, rows of one sequence lie together;
// context [rows]: how many tokens of its sequence a row sees, itself included; blocks [sequences, max_blocks]: cache
// blocks in order, of block_size slots each.
typedef struct {
    int64_t rows;
    const int32_t *sequence, *context, *blocks;
    int64_t max_blocks, block_size;
} clif_rows;

// How scores are made of products of query and key. scale: above 0. softcap: above 0, scores s become softcap * tanh(s /
// softcap). window: above 0, a row sees that many tokens, the last ones of its context. sinks [heads], of the call's
// type, or null: a score of each head that takes its share of each row's softmax and gives nothing.
typedef struct {
    float scale, softcap;
    int64_t window;
    const void *sinks;
} clif_scores;

// out [rows, heads * head_dim] = softmax(scores of q k^T) v over each row's context in the cache, which has its own
// token. query: rows query_stride numbers apart (the merged projection may be passed). Sums and softmax in float32;
// head_dim is a multiple of 8 up to 256. A row's bits depend on its query and its context alone: they are the same for a
// row that continues an answer and inside the chunk of a prompt. No slot outside of what a row sees counts, except that
// within a chunk of a prompt a NaN of another of its tokens may reach it. Slots that no row of a sequence in the step
// sees are not read.
CLIF_API void clif_attention(int type, const clif_heads *heads, const void *query, int64_t query_stride,
                             const void *cache, int64_t cache_slots, const clif_rows *rows, const clif_scores *scores,
                             void *out, int threads);

// ---- decoder layers (layers.cpp), bfloat16 ----

// norm, mlp_norm: before attention and MLP; post_norm, post_mlp_norm: of what they give, which is multiplied by
// residual_scale then. q_all, k_all: of all heads of a row at once, wide. angles: as clif_rotate has them.
typedef struct {
    clif_linear qkv, out, gate_up, down;
    clif_norm norm, mlp_norm, post_norm, post_mlp_norm, q_all, k_all;
    float residual_scale;
    int activation;
    clif_heads heads;
    clif_scores scores;
    uint16_t *cache;
    const uint16_t *angles;
} clif_layer;

// What all layers of a step share. adapters [rows]: the slot of each row, -1 for none; null: none at all.
typedef struct {
    clif_rows rows;
    const int64_t *positions, *slots;
    const int32_t *adapters;
    int64_t cache_slots;
} clif_step;

// Numbers of scratch that clif_layers needs for so many rows.
CLIF_API int64_t clif_layers_scratch(const clif_layer *layer, int64_t rows);
// hidden [rows, hidden size] through `count` layers, in place.
CLIF_API void clif_layers(const clif_layer *layers, int64_t count, const clif_step *step, uint16_t *hidden,
                          uint16_t *scratch, int level, int threads);
