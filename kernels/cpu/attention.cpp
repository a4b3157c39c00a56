// Attention of a step's rows to the paged KV cache, read in place.
//
// An item is one KV head of a tile of rows of one sequence. It lays keys and values of 128 tokens at a time out as the
// products read them, once for all queries of the tile, and keeps a running softmax for each query. The largest score,
// the sums and their order depend on the row's own query and context alone: a decode row and the same row inside a chunk
// of a prompt get equal bits, on any number of threads. Slots behind a row's context and before its window are not read,
// unless another row of its tile sees them; they then count with a weight of zero.
//
// Sources: FlashAttention (Dao et al. 2022), online softmax (Milakov and Gimelshein 2018); PagedAttention (Kwon et al.,
// SOSP 2023).
#include "attention_items.h"

namespace clif {
namespace {

constexpr float TO_BASE_2 = 1.44269504f;

template <class T>
void multiply_at(const Call<T> &call, Left<T> a, Right b, Sums c, Size size) {
    if constexpr (sizeof(T) == sizeof(uint16_t)) {
        if (call.amx) return multiply_amx(a, b, c, size);
    }
    multiply<T>(a, b, c, size);
}

// Lanes of the 16 tokens from i on that lie in [from, seen).
inline __mmask16 lanes_between(int64_t i, int64_t from, int64_t seen) {
    const __mmask16 below = from > i ? first_lanes(from - i) : 0;
    return first_lanes(seen > i ? seen - i : 0) & ~below;
}

// Scores become tanh(factor * score): the cap is a factor of what the softmax reads.
void cap(float *scores, int64_t seen, float factor) {
    for (int64_t i = 0; i < seen; i += LANES) {
        _mm512_storeu_ps(scores + i, tanh(_mm512_mul_ps(_mm512_loadu_ps(scores + i), splat(factor))));
    }
}

float largest_score(const float *scores, int64_t from, int64_t seen) {
    __m512 largest = splat(-INFINITY);
    int64_t i = from / LANES * LANES;
    if (i < from) {
        const __mmask16 mask = lanes_between(i, from, seen);
        largest = _mm512_mask_max_ps(largest, mask, largest, load(scores + i, mask));
        i += LANES;
        if (i >= seen) return _mm512_reduce_max_ps(largest);
    }
    for (; i + LANES <= seen; i += LANES) largest = _mm512_max_ps(largest, load(scores + i));
    const __mmask16 mask = first_lanes(seen - i);
    return _mm512_reduce_max_ps(_mm512_mask_max_ps(largest, mask, largest, load(scores + i, mask)));
}

// Weights 2^(scale (score - largest)) of tokens [from, seen), zeros before them and up to `width` and the next 32.
// Returns their sum by lanes.
template <class T>
__m512 weigh(const float *scores, int64_t from, int64_t seen, int64_t width, float scale, float largest, T *weights) {
    const __m512 factor = splat(scale), below = splat(largest * scale);
    const auto weight_of = [&](int64_t i) {
        return exp2<T>(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, below));
    };
    const auto seen_weight_of = [&](int64_t i) {
        return _mm512_maskz_mov_ps(lanes_between(i, from, seen), weight_of(i));
    };
    __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const auto take = [&](int64_t i, __m512 first, __m512 second) {
        totals[0] = _mm512_add_ps(totals[0], first);
        totals[1] = _mm512_add_ps(totals[1], second);
        store_two(weights + i, first, second);
    };
    int64_t i = 0;
    for (; i + 2 * LANES <= from; i += 2 * LANES) store_two(weights + i, _mm512_setzero_ps(), _mm512_setzero_ps());
    if (i < from) {
        take(i, seen_weight_of(i), seen_weight_of(i + LANES));
        i += 2 * LANES;
    }
    for (; i + 2 * LANES <= seen; i += 2 * LANES) take(i, weight_of(i), weight_of(i + LANES));
    for (; i < width; i += 2 * LANES) take(i, seen_weight_of(i), seen_weight_of(i + LANES));
    return _mm512_add_ps(totals[0], totals[1]);
}

// 16 queries, from number `first` of an item on, and the tokens [from, of) of the chunk that each sees, none where `of`
// is 0. width: tokens that are computed. Their scores are in one of two places.
struct Seen {
    int64_t first, count, most, width, of[TILE], from[TILE];
    float *scores;
};

template <class T>
Seen seen_of(const Scratch<T> &own, int64_t queries, int64_t first, int64_t begin) {
    Seen seen = {first, queries - first < TILE ? queries - first : TILE, 0, 0, {}, {}, nullptr};
    const int64_t room = next_chunk(begin) - begin;
    for (int64_t i = 0; i < seen.count; ++i) {
        const int64_t n = own.context[first + i] - begin, from = own.first[first + i] - begin;
        if (n <= 0 || from >= room) continue;
        seen.of[i] = n < room ? n : room;
        seen.from[i] = from < 0 ? 0 : from;
        if (seen.of[i] > seen.most) seen.most = seen.of[i];
    }
    seen.width = round_up(seen.most, PER_ROW<T>);
    return seen;
}

// The factor by which the sums of each query shrink, now that its largest score may be another.
template <class T>
__m512 shrink(const Call<T> &call, Scratch<T> &own, const Seen &seen) {
    alignas(64) float here[TILE];
    for (int64_t i = 0; i < TILE; ++i) {
        here[i] = seen.of[i] ? largest_score(seen.scores + i * CHUNK, seen.from[i], seen.of[i]) : -INFINITY;
    }
    float *kept = own.largest + seen.first;
    // A NaN passes: the second argument is taken for it.
    const __m512 before = _mm512_loadu_ps(kept), largest = _mm512_max_ps(_mm512_load_ps(here), before);
    _mm512_storeu_ps(kept, largest);
    const __mmask16 same = _mm512_cmp_ps_mask(before, largest, _CMP_EQ_OQ);
    const __m512 factor = exp2<float>(_mm512_mul_ps(_mm512_sub_ps(before, largest), splat(call.scale)));
    return _mm512_mask_mov_ps(factor, same, splat(1.0f));
}

void rescale(float *sums, float factor, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), splat(factor)));
    }
}

// Take the scores of a chunk into the softmax of each query.
template <class T>
void soften(const Call<T> &call, Scratch<T> &own, const Seen &seen) {
    alignas(64) float factors[TILE];
    if (call.scores.softcap > 0) {
        const float factor = call.scores.scale / call.scores.softcap;
        for (int64_t i = 0; i < seen.count; ++i) cap(seen.scores + i * CHUNK, seen.of[i], factor);
    }
    _mm512_store_ps(factors, shrink(call, own, seen));
    const int64_t of_head = value_tiles<T>(call.head_dim()) * TILE;
    for (int64_t i = 0; i < seen.count; ++i) {
        const int64_t query = seen.first + i, n = seen.of[i];
        T *weights = own.weights + i * CHUNK;
        if (n == 0) {
            memset(weights, 0, seen.width * sizeof(T));
            continue;
        }
        const __m512 added = weigh<T>(seen.scores + i * CHUNK, seen.from[i], n, seen.width, call.scale,
                                      own.largest[query], weights);
        own.total[query] = _mm512_fmadd_ps(own.total[query], splat(factors[i]), added);
        if (factors[i] != 1.0f) rescale(own.sums + query * of_head, factors[i], of_head);
    }
}

template <class T>
void find_scores(const Call<T> &call, Scratch<T> &own, const Seen &seen) {
    const int64_t inner = call.inner(), dwords = inner / PER_DWORD<T>;
    multiply_at<T>(call, {own.queries + seen.first * inner, inner},
                   {reinterpret_cast<uint32_t *>(own.keys), TILE, TILE * dwords}, {seen.scores, CHUNK, false},
                   {seen.count, dwords, seen.width / TILE});
}

template <class T>
void add_values(const Call<T> &call, Scratch<T> &own, const Seen &seen) {
    const int64_t tiles = value_tiles<T>(call.head_dim()), width = tiles * TILE;
    multiply_at<T>(call, {own.weights, CHUNK}, {reinterpret_cast<uint32_t *>(own.values), width, TILE},
                   {own.sums + seen.first * width, width, true}, {seen.count, seen.width / PER_DWORD<T>, tiles});
}

// A sink is a token that every query of its head has seen before any other: its weight is 1 until a larger score comes.
template <class T>
void begin_with_sinks(const Call<T> &call, Scratch<T> &own, const Item &item) {
    const T *sinks = static_cast<const T *>(call.scores.sinks) + item.kv_head * call.group() + item.head;
    for (int64_t i = 0; i < item.queries(); ++i) {
        own.largest[i] = widen(sinks[i % item.count]) * TO_BASE_2 / call.scale;
        own.total[i] = _mm512_maskz_mov_ps(1, splat(1.0f));
    }
}

template <class T>
void begin_item(const Call<T> &call, Scratch<T> &own, const Item &item) {
    const int64_t d = call.head_dim(), inner = call.inner(), head = item.kv_head * call.group() + item.head;
    const int64_t padding = static_cast<int64_t>((inner - d) * sizeof(T));
    T *to = own.queries;
    int64_t *context = own.context, *first = own.first;
    for (int64_t row = 0; row < item.tile.rows; ++row) {
        const T *from = call.query + (item.tile.row + row) * call.query_stride + head * d;
        for (int64_t i = 0; i < item.count; ++i, from += d, to += inner) {
            *context++ = call.rows.context[item.tile.row + row];
            *first++ = call.first_seen(call.rows.context[item.tile.row + row]);
            memcpy(to, from, d * sizeof(T));
            if (padding) memset(to + d, 0, padding);
        }
    }
    for (int64_t i = 0; i < round_up(item.queries(), TILE); ++i) {
        own.largest[i] = -INFINITY;
        own.total[i] = _mm512_setzero_ps();
    }
    if (call.scores.sinks) begin_with_sinks(call, own, item);
    memset(own.sums, 0, item.queries() * value_tiles<T>(d) * TILE * sizeof(float));
}

template <class T>
void end_item(const Call<T> &call, Scratch<T> &own, const Item &item) {
    const int64_t d = call.head_dim(), width = value_tiles<T>(d) * TILE;
    const int64_t head = item.kv_head * call.group() + item.head;
    int64_t query = 0;
    for (int64_t row = 0; row < item.tile.rows; ++row) {
        T *to = call.out + ((item.tile.row + row) * call.heads.heads + head) * d;
        for (int64_t i = 0; i < item.count; ++i, ++query) {
            const float total = _mm512_reduce_add_ps(own.total[query]);
            store_head(own.sums + query * width, total == 0.0f ? 0.0f : 1.0f / total, d, to + i * d);
        }
    }
}

// Items one after the other: the memory that comes next is asked for while one is computed.
template <class T>
class Worker {
   public:
    explicit Worker(const Call<T> &call) : call_(call) {
        memset(own_.nothing, 0, sizeof own_.nothing);
        if (call.amx) shape_tiles();
    }

    void attend(const Item &item) {
        if (waits_) run(&item);
        if (!waits_ || item_.tile.context == 0) find_tokens(call_, item, item.tile.begin(), own_.nothing, now());
        item_ = item;
        waits_ = true;
    }

    void finish() {
        if (waits_) run(nullptr);
    }

   private:
    // The item that waits; `after` is the one behind it.
    void run(const Item *after) {
        begin_item(call_, own_, item_);
        const bool few = serves_few();
        if (few) turn_queries();
        for (int64_t begin = item_.tile.begin(); begin < item_.tile.context; begin = next_chunk(begin), at_ ^= 1) {
            if (next_chunk(begin) < item_.tile.context) {
                find_tokens(call_, item_, next_chunk(begin), own_.nothing, next());
            } else if (after) {
                find_tokens(call_, *after, after->tile.begin(), own_.nothing, next());
            } else {
                next().count = 0;
            }
            if (few) {
                attend_few(begin);
            } else {
                pack_chunk(call_, own_, now(), next());
                attend_chunk(begin);
            }
        }
        end_item(call_, own_, item_);
    }

    // 16 queries at a time. The scores of the next ones are on their way while the softmax is computed, so that the tile
    // unit does not wait for it.
    void attend_chunk(int64_t begin) {
        Seen seen = score(0, begin);
        for (int which = 1; seen.count > 0; which ^= 1) {
            soften(call_, own_, seen);
            const Seen next = score(seen.first + TILE, begin, which);
            if (seen.most > 0) add_values(call_, own_, seen);
            seen = next;
        }
    }

    Seen score(int64_t first, int64_t begin, int which = 0) {
        Seen seen = seen_of(own_, item_.queries(), first, begin);
        seen.scores = own_.scores[which];
        if (seen.most > 0) find_scores(call_, own_, seen);
        return seen;
    }

    // Whether the item's keys and values are multiplied where they lie: the bits are the same.
    bool serves_few() const {
        return call_.amx && item_.queries() <= FEW && call_.head_dim() % 32 == 0 && call_.rows.block_size % TILE == 0;
    }

    void turn_queries() {
        const T *queries[TILE];
        for (int64_t i = 0; i < TILE; ++i) {
            queries[i] = i < item_.queries() ? own_.queries + i * call_.inner() : own_.nothing;
        }
        const int64_t dwords = call_.inner() / PER_DWORD<T>;
        pack_keys(queries, call_.head_dim(), dwords, reinterpret_cast<uint32_t *>(own_.values));
    }

    void attend_few(int64_t begin) {
        if constexpr (sizeof(T) == sizeof(uint16_t)) {
            Seen seen = seen_of(own_, item_.queries(), 0, begin);
            seen.scores = own_.scores[0];
            // Apart, so that a product does not wait until the scores before are turned.
            const bool loaded = load_queries(reinterpret_cast<uint32_t *>(own_.values), call_.head_dim());
            for (int64_t i = 0; i < seen.most; i += TILE) score_16(i, loaded);
            for (int64_t i = 0; i < seen.most; i += TILE) turn_scores(own_.by_token + i * TILE, seen.scores + i, CHUNK);
            soften(call_, own_, seen);
            const int64_t tokens = round_up(seen.most, 2);
            for (int64_t i = now().count; i < tokens; ++i) now().value[i] = own_.nothing;
            for (int64_t i = 0; i < seen.count; ++i) widen_weights(seen, i);
            add_few(seen.count, seen.scores, CHUNK, now().value, tokens, call_.head_dim(), own_.sums);
        }
    }

    // Scores of 16 tokens; behind the last one, whatever.
    void score_16(int64_t at, bool loaded) {
        const int64_t d = call_.head_dim(), left = now().count - at;
        const T *keys = now().key[at];
        if (left < TILE || at < now().unseen) {
            for (int64_t i = 0; i < left && i < TILE; ++i) memcpy(own_.keys + i * d, now().key[at + i], d * sizeof(T));
            keys = own_.keys;
        }
        for (int64_t j = at; j < at + TILE && j < next().count; ++j) {
            prefetch(next().key[j], d);
            prefetch(next().value[j], d);
        }
        score_tokens(keys, d, reinterpret_cast<uint32_t *>(own_.values), loaded, own_.by_token + at * TILE);
    }

    void widen_weights(const Seen &seen, int64_t query) {
        for (int64_t i = 0; i < seen.width; i += LANES) {
            store(seen.scores + query * CHUNK + i, load(own_.weights + query * CHUNK + i));
        }
    }

    Tokens<T> &now() { return own_.tokens[at_]; }
    Tokens<T> &next() { return own_.tokens[at_ ^ 1]; }

    const Call<T> &call_;
    Scratch<T> own_;
    Item item_;
    bool waits_ = false;
    int at_ = 0;
};

// Whether bfloat16 numbers are multiplied by AMX.
bool has_amx() {
    static const bool has = clif_level() == CLIF_AMX;
    return has;
}

template <class T>
void attend_share(const Call<T> &call, int thread, int threads) {
    const int64_t group = call.group(), heads = group < QUERIES ? group : QUERIES, most = QUERIES / heads;
    int64_t total = 0, before = 0;
    for_tiles(call, most, [&](const RowTile &tile) { total += cost_of(tile, group) * call.heads.kv_heads; });
    Worker<T> worker(call);
    for_tiles(call, most, [&](const RowTile &tile) {
        const int64_t cost = cost_of(tile, group);
        for (int64_t kv_head = 0; kv_head < call.heads.kv_heads; ++kv_head, before += cost) {
            // The thread in whose share of the total the middle of the item lies.
            if ((2 * before + cost) * threads / (2 * total) != thread) continue;
            for (int64_t head = 0; head < group; head += heads) {
                worker.attend({tile, kv_head, head, group - head < heads ? group - head : heads});
            }
        }
    });
    worker.finish();
}

}  // namespace

template <class T>
void attention(const clif_heads &heads, const T *query, int64_t query_stride, const T *cache, int64_t cache_slots,
               const clif_rows &rows, const clif_scores &scores, T *out, int thread, int threads) {
    const bool amx = sizeof(T) == sizeof(uint16_t) && has_amx();
    // Of capped scores the softmax reads tanh.
    const float to_base_2 = (scores.softcap > 0 ? scores.softcap : scores.scale) * TO_BASE_2;
    const NoSubnormals as_in_amx;
    attend_share<T>({heads, query, query_stride, cache, cache_slots, rows, scores, out, amx, to_base_2}, thread, threads);
    if (amx) _tile_release();
}

// For both types, for layers.cpp as well.
template void attention(const clif_heads &, const float *, int64_t, const float *, int64_t, const clif_rows &,
                        const clif_scores &, float *, int, int);
template void attention(const clif_heads &, const uint16_t *, int64_t, const uint16_t *, int64_t, const clif_rows &,
                        const clif_scores &, uint16_t *, int, int);

}  // namespace clif

CLIF_API void clif_attention(int type, const clif_heads *heads, const void *query, int64_t query_stride,
                             const void *cache, int64_t cache_slots, const clif_rows *rows, const clif_scores *scores,
                             void *out, int threads) {
    clif::of_type(type, [&](auto number) {
        using T = decltype(number);
        clif::on_threads(threads, [&](int thread, int count) {
            clif::attention<T>(*heads, static_cast<const T *>(query), query_stride, static_cast<const T *>(cache),
                               cache_slots, *rows, *scores, static_cast<T *>(out), thread, count);
        });
    });
}
