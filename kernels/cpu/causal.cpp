// Causal attention within packed sequences, forward and backward: no matrix of length x length is kept. A task is a
// sequence and a KV head, which one thread computes with all query heads of that KV head.
//
// Sources: grouped-query attention (Ainslie et al. 2023); FlashAttention (Dao et al. 2022) for the backward from the log
// of each row's sum.
#include <math.h>

#include "panels.h"
#include "training.h"

namespace clif::training {
namespace {

// Queries at a time: their scores stay in a core's caches.
constexpr int64_t QUERIES = 64;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// A thread's own memory. Rows of queries and keys are padded to 32 numbers, sequences to 32 tokens.
struct Own {
    Own(int64_t head_dim, int64_t longest, bool backward, Scratch &scratch) {
        const int64_t d32 = padded(head_dim), d16 = padded16(head_dim), tokens = padded(longest);
        keys_t = scratch.take<uint16_t>(tokens * d32);
        values = scratch.take<uint16_t>(tokens * d16);
        q = scratch.take<uint16_t>(QUERIES * d32);
        rows = scratch.take<uint16_t>(QUERIES * tokens);
        scores = scratch.take<float>(QUERIES * tokens);
        sums = scratch.take<float>(QUERIES * d16);
        if (!backward) return;
        values_t = scratch.take<uint16_t>(tokens * d32);
        keys = scratch.take<uint16_t>(tokens * d16);
        g = scratch.take<uint16_t>(QUERIES * d32);
        q_t = scratch.take<uint16_t>(QUERIES * d32);
        g_t = scratch.take<uint16_t>(QUERIES * d32);
        p_panels = scratch.take<uint16_t>(QUERIES * tokens);
        ds_panels = scratch.take<uint16_t>(QUERIES * tokens);
        slopes = scratch.take<float>(QUERIES * tokens);
        dk_t = scratch.take<float>(d16 * tokens);
        dv_t = scratch.take<float>(d16 * tokens);
    }
    // Right sides: keys and values as they are, and transposed. Left sides: queries and gradients, the same transposed,
    // and rows of probabilities (backward: of gradients of scores).
    uint16_t *keys_t, *values, *values_t = nullptr, *keys = nullptr, *q, *g = nullptr, *q_t = nullptr, *g_t = nullptr;
    uint16_t *rows, *p_panels = nullptr, *ds_panels = nullptr;
    // slopes: gradients of probabilities; dk_t, dv_t [head_dim, tokens]: those of keys and values so far.
    float *scores, *sums, *slopes = nullptr, *dk_t = nullptr, *dv_t = nullptr;
};

// One sequence under one KV head. Rows [begin, begin + length) of the batch.
struct Task {
    int64_t begin, length, kv_head;
};

// Queries of a task at hand: rows [first, first + count) of the sequence, padded to `height`, which see `width` keys from
// number `from` on, the last of them masked, and with a window the first.
struct Block {
    Block(int64_t first, int64_t length, int64_t window)
        : first(first),
          count(length - first < QUERIES ? length - first : QUERIES),
          height(padded(count)),
          window(window),
          from(first_seen(0) / 32 * 32),
          width(first + height - from) {}

    // The keys that query i sees, [begin, end) of the sequence.
    int64_t first_seen(int64_t i) const { return window > 0 && first + i + 1 > window ? first + i + 1 - window : 0; }
    Range seen(int64_t i) const { return {first_seen(i) - from, first + i + 1 - from}; }

    int64_t first, count, height, window, from, width;
};

// Lanes of the 16 keys from j on that lie in a range.
inline __mmask16 lanes_in(const Range &seen, int64_t j) {
    const __mmask16 below = seen.begin > j ? first_lanes(seen.begin - j) : 0;
    return j < seen.end ? first_lanes(seen.end - j) & ~below : 0;
}

// Scores become tanh(scale / softcap * score), in place; where there is no cap they stay. Returns what the softmax
// multiplies them by, to base 2.
float cap(const clif_scores &scores, const Block &b, float *s) {
    if (!(scores.softcap > 0)) return scores.scale * LOG2_E;
    const __m512 rate = splat(scores.scale / scores.softcap);
    for (int64_t j = 0; j < b.height * b.width; j += LANES) {
        _mm512_storeu_ps(s + j, tanh(_mm512_mul_ps(_mm512_loadu_ps(s + j), rate)));
    }
    return scores.softcap * LOG2_E;
}

// The score of a head that takes its share of each softmax; minus infinity where there is none.
float sink_of(const clif_scores &scores, int64_t head) {
    return scores.sinks ? widen(static_cast<const uint16_t *>(scores.sinks)[head]) : -INFINITY;
}

// Rows of `from` [count, d] as [height, padded(d)], zeros behind rows and columns.
void copy_padded(const uint16_t *from, int64_t stride, int64_t count, int64_t d, uint16_t *to, int64_t height) {
    const int64_t wide = padded(d);
    for (int64_t i = 0; i < height; i++)
        for (int64_t j = 0; j < wide; j += 32) {
            const __mmask32 lanes = i < count ? lanes32(d - j) : 0;
            _mm512_storeu_si512(to + i * wide + j, _mm512_maskz_loadu_epi16(lanes, from + i * stride + j));
        }
}

// Panels of the transpose of `from` [tokens, d], with zeros behind the last token.
void pack_transposed(const uint16_t *from, int64_t stride, int64_t tokens, int64_t d, uint16_t *panels) {
    const int64_t deep = padded(d), done = padded16(tokens), rest = padded(tokens) - done;
    pack_columns(from, stride, d, tokens, panels);
    __builtin_memset(panels + done * deep, 0, rest * deep * sizeof *panels);
}

// p = 2^(factor s - most) of the `seen` of `count` scores, zeros elsewhere. Returns the sum of p in float32, that of the
// sink among them, and in log_sum the log of that of e^score.
float weigh(const float *s, const Range &seen, int64_t count, float base, float sink, uint16_t *p, float *log_sum) {
    const __m512 factor = splat(base);
    __m512 most = splat(sink * LOG2_E), total = _mm512_setzero_ps();
    for (int64_t j = seen.begin / LANES * LANES; j < seen.end; j += LANES) {
        const __mmask16 mask = lanes_in(seen, j);
        // A NaN is the second argument, which is taken then.
        most = _mm512_mask_max_ps(most, mask, most, _mm512_mul_ps(load(s + j, mask), factor));
    }
    const float top = _mm512_reduce_max_ps(most);
    for (int64_t j = 0; j < count; j += LANES) {
        const __mmask16 mask = lanes_in(seen, j);
        const __m512 x = _mm512_maskz_mov_ps(mask, exp2<uint16_t>(_mm512_fmsub_ps(load(s + j), factor, splat(top))));
        total = _mm512_add_ps(total, x);
        store(p + j, x);
    }
    float sum = _mm512_reduce_add_ps(total);
    if (sink != -INFINITY) sum += expf(sink - top * LN_2);
    *log_sum = top * LN_2 + logf(sum);
    return sum;
}

void forward(const clif_sequences &of, const Task &task, const Own &own, const Tiles &tiles, uint16_t *out,
             float *log_sums) {
    const int64_t d = of.head_dim, d32 = padded(d), d16 = padded16(d), tokens = padded(task.length);
    const int64_t group = of.heads / of.kv_heads, wide = of.heads * d, all = of.ends[of.sequences];
    const int64_t at = task.begin * of.stride + task.kv_head * d;
    pack_transposed(of.key + at, of.stride, task.length, d, own.keys_t);
    pack_rows(of.value + at, of.stride, task.length, d, own.values);
    for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; head++)
        for (int64_t first = 0; first < task.length; first += QUERIES) {
            const Block b(first, task.length, of.scores.window);
            const int64_t row = task.begin + first;
            float *log_sum = log_sums + head * all + row, totals[QUERIES];
            copy_padded(of.query + row * of.stride + head * d, of.stride, b.count, d, own.q, b.height);
            multiply(tiles, own.q, d32, own.keys_t + b.from * d32, d32 * 16, own.scores, b.width, b.height, b.width, d32,
                     false);
            const float factor = cap(of.scores, b, own.scores);
            for (int64_t i = 0; i < b.count; i++)
                totals[i] = weigh(own.scores + i * b.width, b.seen(i), b.width, factor, sink_of(of.scores, head),
                                  own.rows + i * b.width, log_sum + i);
            __builtin_memset(own.rows + b.count * b.width, 0, (b.height - b.count) * b.width * sizeof *own.rows);
            multiply(tiles, own.rows, b.width, own.values + b.from * 16, tokens * 16, own.sums, d16, b.height, d16,
                     b.width, false);
            for (int64_t i = 0; i < b.count; i++)
                for (int64_t j = 0; j < d; j += LANES) {
                    const __m512 x = _mm512_mul_ps(load(own.sums + i * d16 + j), splat(1.0f / totals[i]));
                    store(out + (row + i) * wide + head * d + j, x, first_lanes(d - j));
                }
        }
}

// The sum of grad * out of each query: what the softmax's backward subtracts.
void row_dots(const uint16_t *grad, const uint16_t *out, int64_t stride, int64_t count, int64_t d, float *dots) {
    for (int64_t i = 0; i < count; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < d; j += LANES) {
            const __mmask16 mask = first_lanes(d - j);
            sum = _mm512_fmadd_ps(load(grad + i * stride + j, mask), load(out + i * stride + j, mask), sum);
        }
        dots[i] = _mm512_reduce_add_ps(sum);
    }
}

// From scores and gradients of probabilities: panels of probabilities and of gradients of scores, and rows of the latter.
// factor: of scores, as cap() returns it. CAPPED: they are tanh(x), whose slope is 1 - tanh(x)^2.
template <bool CAPPED>
void score_gradients(const Own &own, const Block &b, float scale, float base, const float *log_sums, const float *dots) {
    const __m512 factor = splat(base);
    for (int64_t i = 0; i < b.height; i += 2)
        for (int64_t j = 0; j < b.width; j += LANES) {
            __m512 p[2], ds[2];
            for (int64_t k = 0; k < 2; k++) {
                const int64_t row = i + k, at = row * b.width + j;
                const __mmask16 mask = row < b.count ? lanes_in(b.seen(row), j) : 0;
                p[k] = ds[k] = _mm512_setzero_ps();
                if (mask) {
                    const __m512 s = load(own.scores + at);
                    const __m512 x = _mm512_fmsub_ps(s, factor, splat(log_sums[row] * LOG2_E));
                    p[k] = _mm512_maskz_mov_ps(mask, exp2<uint16_t>(x));
                    const __m512 apart = _mm512_sub_ps(load(own.slopes + at), splat(dots[row]));
                    ds[k] = _mm512_maskz_mul_ps(mask, _mm512_mul_ps(p[k], splat(scale)), apart);
                    if (CAPPED) ds[k] = _mm512_mul_ps(ds[k], _mm512_fnmadd_ps(s, s, splat(1.0f)));
                }
                store(own.rows + at, ds[k]);
            }
            const int64_t at = j * b.height + i * 16;
            _mm512_storeu_si512(own.p_panels + at, round_pairs(p[0], p[1]));
            _mm512_storeu_si512(own.ds_panels + at, round_pairs(ds[0], ds[1]));
        }
}

// to [length, d] = the transpose of sums [d, tokens].
void put_transposed(const float *sums, int64_t tokens, int64_t length, int64_t d, uint16_t *to, int64_t stride) {
    for (int64_t j = 0; j < d; j += LANES)
        for (int64_t i = 0; i < length; i += LANES) {
            __m512i r[LANES];
            for (int k = 0; k < LANES; k++) r[k] = _mm512_loadu_si512(sums + (j + k) * tokens + i);
            transpose16(r);
            for (int64_t k = 0; k < LANES && i + k < length; k++)
                store(to + (i + k) * stride + j, _mm512_castsi512_ps(r[k]), first_lanes(d - j));
        }
}

// Where the gradients of query, key and value go, rows `stride` numbers apart.
struct Gradients {
    uint16_t *query, *key, *value;
    int64_t stride;
};

void backward(const clif_sequences &of, const Task &task, const Own &own, const Tiles &tiles, const uint16_t *out,
              const float *log_sums, const uint16_t *grad, const Gradients &to) {
    const int64_t d = of.head_dim, d32 = padded(d), d16 = padded16(d), tokens = padded(task.length);
    const int64_t group = of.heads / of.kv_heads, wide = of.heads * d, all = of.ends[of.sequences];
    const int64_t at = task.begin * of.stride + task.kv_head * d, to_at = task.begin * to.stride + task.kv_head * d;
    pack_transposed(of.key + at, of.stride, task.length, d, own.keys_t);
    pack_transposed(of.value + at, of.stride, task.length, d, own.values_t);
    pack_rows(of.key + at, of.stride, task.length, d, own.keys);
    __builtin_memset(own.dk_t, 0, d16 * tokens * sizeof *own.dk_t);
    __builtin_memset(own.dv_t, 0, d16 * tokens * sizeof *own.dv_t);
    for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; head++)
        for (int64_t first = 0; first < task.length; first += QUERIES) {
            const Block b(first, task.length, of.scores.window);
            const int64_t row = task.begin + first, side = row * wide + head * d;
            float dots[QUERIES];
            copy_padded(of.query + row * of.stride + head * d, of.stride, b.count, d, own.q, b.height);
            copy_padded(grad + side, wide, b.count, d, own.g, b.height);
            multiply(tiles, own.q, d32, own.keys_t + b.from * d32, d32 * 16, own.scores, b.width, b.height, b.width, d32,
                     false);
            multiply(tiles, own.g, d32, own.values_t + b.from * d32, d32 * 16, own.slopes, b.width, b.height, b.width,
                     d32, false);
            row_dots(grad + side, out + side, wide, b.count, d, dots);
            const auto gradients = of.scores.softcap > 0 ? score_gradients<true> : score_gradients<false>;
            gradients(own, b, of.scores.scale, cap(of.scores, b, own.scores), log_sums + head * all + row, dots);
            multiply(tiles, own.rows, b.width, own.keys + b.from * 16, tokens * 16, own.sums, d16, b.height, d16, b.width,
                     false);
            for (int64_t i = 0; i < b.count; i++)
                for (int64_t j = 0; j < d; j += LANES)
                    store(to.query + (row + i) * to.stride + head * d + j, load(own.sums + i * d16 + j),
                          first_lanes(d - j));
            transpose(own.q, d32, b.height, d, own.q_t);
            transpose(own.g, d32, b.height, d, own.g_t);
            multiply(tiles, own.q_t, b.height, own.ds_panels, b.height * 16, own.dk_t + b.from, tokens, d16, b.width,
                     b.height, true);
            multiply(tiles, own.g_t, b.height, own.p_panels, b.height * 16, own.dv_t + b.from, tokens, d16, b.width,
                     b.height, true);
        }
    put_transposed(own.dk_t, tokens, task.length, d, to.key + to_at, to.stride);
    put_transposed(own.dv_t, tokens, task.length, d, to.value + to_at, to.stride);
}

int64_t longest(const clif_sequences &of) {
    int64_t most = 0;
    for (int64_t i = 0; i < of.sequences; i++) {
        const int64_t length = of.ends[i + 1] - of.ends[i];
        if (length > most) most = length;
    }
    return most;
}

int64_t own_bytes(const clif_sequences &of, bool backward) {
    Scratch scratch(nullptr);
    Own(of.head_dim, longest(of), backward, scratch);
    return scratch.bytes();
}

// Run part(task, own, tiles) for all tasks, each by one thread.
template <class Part>
void on_tasks(const clif_sequences &of, bool backward, void *scratch, int level, int threads, Part part) {
    const int64_t each = own_bytes(of, backward), most = longest(of), tasks = of.sequences * of.kv_heads;
    on_threads(threads, [&](int thread, int) {
        Scratch mine(static_cast<char *>(scratch) + thread * each);
        const Own own(of.head_dim, most, backward, mine);
        const Tiles tiles(level);
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < tasks; i++) {
            const int64_t sequence = i / of.kv_heads, begin = of.ends[sequence];
            part(Task{begin, of.ends[sequence + 1] - begin, i % of.kv_heads}, own, tiles);
        }
    });
}

}  // namespace
}  // namespace clif::training

using namespace clif;
using namespace clif::training;

CLIF_API int64_t clif_causal_scratch(const clif_sequences *of, int backward, int threads) {
    return threads * own_bytes(*of, backward != 0);
}

CLIF_API void clif_causal(const clif_sequences *of, uint16_t *out, float *log_sums, void *scratch, int level,
                          int threads) {
    on_tasks(*of, false, scratch, level, threads, [&](const Task &task, const Own &own, const Tiles &tiles) {
        forward(*of, task, own, tiles, out, log_sums);
    });
}

CLIF_API void clif_causal_backward(const clif_sequences *of, const uint16_t *out, const float *log_sums,
                                   const uint16_t *grad, uint16_t *grad_query, uint16_t *grad_key, uint16_t *grad_value,
                                   int64_t grad_stride, void *scratch, int level, int threads) {
    const Gradients to{grad_query, grad_key, grad_value, grad_stride};
    on_tasks(*of, true, scratch, level, threads, [&](const Task &task, const Own &own, const Tiles &tiles) {
        backward(*of, task, own, tiles, out, log_sums, grad, to);
    });
}
