// Attention of a step's rows to the paged KV cache, read in place.
//
// An item is one KV head of a tile of rows of one sequence. It lays keys and values of 128 tokens at a time out as the
// products read them, once for all queries of the tile, and keeps a running softmax for each query. The largest score,
// the sums and their order depend on the row's own query and context alone: a decode row and the same row inside a chunk
// of a prompt get equal bits, on any number of threads. Slots behind a row's context are not read, unless a later row of
// its tile sees them; they then count with a weight of zero.
//
// Sources: FlashAttention (Dao et al. 2022), online softmax (Milakov and Gimelshein 2018); PagedAttention (Kwon et al.,
// SOSP 2023).
#include <math.h>
#include <string.h>

#include "attention_tiles.h"
#include "parts.h"

namespace clif {
namespace {

// Tokens whose keys and values lie in a cache of the first or second level; queries of one item.
constexpr int64_t CHUNK = 128, QUERIES = 192;

// Rows of one sequence, the most tokens that one of them sees.
struct RowTile {
    int64_t row, rows, context;
};

// Memory of one thread, on its stack.
template <class T>
struct alignas(64) Scratch {
    T keys[CHUNK * MAX_HEAD_DIM], values[CHUNK * MAX_HEAD_DIM], queries[QUERIES * MAX_HEAD_DIM];
    float sums[QUERIES * MAX_HEAD_DIM], scores[TILE * CHUNK];
    T weights[TILE * CHUNK], nothing[MAX_HEAD_DIM];
    __m512 total[QUERIES];
    float largest[QUERIES];
    const T *key[CHUNK], *value[CHUNK];
};

// What all items of a call share.
template <class T>
struct Call {
    const clif_heads &heads;
    const T *query;
    int64_t query_stride;
    const T *cache;
    int64_t cache_slots;
    const clif_rows &rows;
    float scale;  // to base 2
    T *out;
    bool amx;

    int64_t head_dim() const { return heads.head_dim; }
    int64_t group() const { return heads.heads / heads.kv_heads; }
    // Numbers of a head, padded.
    int64_t inner() const { return round_up(heads.head_dim, PER_ROW<T>); }
};

// The queries of an item: `count` heads of the group, from `head` on, of each row. Row by row.
struct Queries {
    int64_t kv_head, head, count;
};

// Where `work` is called with each tile of at most `most` rows, in order. A sequence's rows are cut evenly.
template <class Work>
void for_tiles(const clif_rows &rows, int64_t most, Work work) {
    int64_t begin = 0;
    while (begin < rows.rows) {
        int64_t end = begin + 1;
        while (end < rows.rows && rows.sequence[end] == rows.sequence[begin]) ++end;
        const int64_t n = end - begin, pieces = (n + most - 1) / most;
        for (int64_t i = 0; i < pieces; ++i) {
            RowTile tile = {begin + n * i / pieces, 0, 0};
            tile.rows = begin + n * (i + 1) / pieces - tile.row;
            for (int64_t j = 0; j < tile.rows; ++j) {
                const int64_t context = rows.context[tile.row + j];
                if (context > tile.context) tile.context = context;
            }
            work(tile);
        }
        begin = end;
    }
}

// What an item costs, in units of one query's attention to one token: laying one out costs several.
int64_t cost_of(const RowTile &tile, int64_t group) { return tile.context * (8 + tile.rows * group) + 64; }

template <class T>
void find_tokens(const Call<T> &call, Scratch<T> &own, const RowTile &tile, int64_t kv_head, int64_t begin,
                 int64_t count) {
    const int64_t d = call.head_dim(), size = call.rows.block_size;
    const int32_t *blocks = call.rows.blocks + call.rows.sequence[tile.row] * call.rows.max_blocks;
    const T *keys = call.cache + kv_head * call.cache_slots * d;
    const T *values = keys + call.heads.kv_heads * call.cache_slots * d;
    int64_t block = begin / size, offset = begin % size;
    for (int64_t i = 0; i < CHUNK; ++i) {
        if (i >= count) {
            own.key[i] = own.value[i] = own.nothing;
            continue;
        }
        const int64_t at = (blocks[block] * size + offset) * d;
        own.key[i] = keys + at;
        own.value[i] = values + at;
        if (++offset == size) ++block, offset = 0;
    }
}

// Keys and values of tokens from `begin` on, zeros behind the last one.
template <class T>
void pack_chunk(const Call<T> &call, Scratch<T> &own, int64_t count) {
    const int64_t dwords = call.inner() / PER_DWORD<T>, tiles = value_tiles<T>(call.head_dim());
    const int64_t padded = round_up(count, PER_ROW<T>);
    uint32_t *keys = reinterpret_cast<uint32_t *>(own.keys), *values = reinterpret_cast<uint32_t *>(own.values);
    for (int64_t i = 0; i < padded; i += TILE) {
        pack_keys(own.key + i, call.head_dim(), dwords, keys + i * dwords);
    }
    for (int64_t i = 0; i < padded; i += PER_DWORD<T>) {
        pack_values(own.value + i, call.head_dim(), values + i / PER_DWORD<T> * tiles * TILE);
    }
}

template <class T>
void multiply_at(const Call<T> &call, Left<T> a, Right b, Sums c, Size size) {
    if constexpr (sizeof(T) == sizeof(uint16_t)) {
        if (call.amx) return multiply_amx(a, b, c, size);
    }
    multiply<T>(a, b, c, size);
}

float largest_score(const float *scores, int64_t seen) {
    __m512 largest = splat(-INFINITY);
    for (int64_t i = 0; i < seen; i += LANES) {
        const __mmask16 mask = first_lanes(seen - i);
        largest = _mm512_mask_max_ps(largest, mask, largest, load(scores + i, mask));
    }
    return _mm512_reduce_max_ps(largest);
}

// Weights 2^(scale (score - largest)) of the tokens that are seen, zeros up to `width`. Returns their sum by lanes.
template <class T>
__m512 weigh(const float *scores, int64_t seen, int64_t width, float scale, float largest, T *weights) {
    const __m512 factor = splat(scale), below = splat(largest * scale);
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) {
        const __mmask16 mask = first_lanes(seen > i ? seen - i : 0);
        const __m512 weight =
            _mm512_maskz_mov_ps(mask, exp2<T>(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, below)));
        total = _mm512_add_ps(total, weight);
        store(weights + i, weight);
    }
    return total;
}

// Take a query's scores of a chunk into its softmax: weights, largest score, total, and the factor for what is summed.
template <class T>
float soften(const Call<T> &call, Scratch<T> &own, int64_t query, int64_t row, int64_t seen, int64_t width) {
    T *weights = own.weights + row * CHUNK;
    if (seen <= 0) {
        memset(weights, 0, static_cast<size_t>(width) * sizeof(T));
        return 1.0f;
    }
    const float *scores = own.scores + row * CHUNK;
    const float before = own.largest[query], here = largest_score(scores, seen);
    const float largest = here > before || here != here ? here : before;
    const float factor = before == largest ? 1.0f
        : _mm512_cvtss_f32(exp2<float>(splat((before - largest) * call.scale)));
    own.largest[query] = largest;
    const __m512 added = weigh<T>(scores, seen, width, call.scale, largest, weights);
    own.total[query] = _mm512_fmadd_ps(own.total[query], splat(factor), added);
    return factor;
}

void rescale(float *sums, float factor, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), splat(factor)));
    }
}

// Up to 16 queries and the chunk of tokens from `begin` on.
template <class T>
void attend_tile(const Call<T> &call, Scratch<T> &own, const RowTile &tile, const Queries &queries, int64_t first,
                 int64_t begin) {
    const int64_t of_tile = tile.rows * queries.count, n = of_tile - first < TILE ? of_tile - first : TILE;
    const int32_t *contexts = call.rows.context + tile.row;
    int64_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t context = contexts[(first + i) / queries.count] - begin;
        if (context > most) most = context;
    }
    if (most <= 0) return;
    const int64_t width = most < CHUNK ? round_up(most, PER_ROW<T>) : CHUNK;
    const int64_t inner = call.inner(), dwords = inner / PER_DWORD<T>, tiles = value_tiles<T>(call.head_dim());
    if (call.amx) shape_tiles(n);
    multiply_at<T>(call, {own.queries + first * inner, inner},
                   {reinterpret_cast<uint32_t *>(own.keys), TILE, TILE * dwords}, {own.scores, CHUNK, false},
                   {n, dwords, width / TILE});
    float *sums = own.sums + first * tiles * TILE;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t seen = contexts[(first + i) / queries.count] - begin;
        const float factor = soften(call, own, first + i, i, seen < CHUNK ? seen : CHUNK, width);
        if (factor != 1.0f) rescale(sums + i * tiles * TILE, factor, tiles * TILE);
    }
    multiply_at<T>(call, {own.weights, CHUNK}, {reinterpret_cast<uint32_t *>(own.values), tiles * TILE, TILE},
                   {sums, tiles * TILE, true}, {n, width / PER_DWORD<T>, tiles});
}

template <class T>
void begin_queries(const Call<T> &call, Scratch<T> &own, const RowTile &tile, const Queries &queries) {
    const int64_t d = call.head_dim(), inner = call.inner(), n = tile.rows * queries.count;
    const int64_t head = queries.kv_head * call.group() + queries.head;
    for (int64_t i = 0; i < n; ++i) {
        const T *from = call.query + (tile.row + i / queries.count) * call.query_stride;
        memcpy(own.queries + i * inner, from + (head + i % queries.count) * d, d * sizeof(T));
        memset(own.queries + i * inner + d, 0, (inner - d) * sizeof(T));
        own.largest[i] = -INFINITY;
        own.total[i] = _mm512_setzero_ps();
    }
    memset(own.sums, 0, n * value_tiles<T>(d) * TILE * sizeof(float));
}

template <class T>
void end_queries(const Call<T> &call, Scratch<T> &own, const RowTile &tile, const Queries &queries) {
    const int64_t d = call.head_dim(), width = value_tiles<T>(d) * TILE;
    const int64_t head = queries.kv_head * call.group() + queries.head;
    for (int64_t i = 0; i < tile.rows * queries.count; ++i) {
        const float total = _mm512_reduce_add_ps(own.total[i]);
        T *to = call.out + (tile.row + i / queries.count) * call.heads.heads * d + (head + i % queries.count) * d;
        store_head(own.sums + i * width, total == 0.0f ? 0.0f : 1.0f / total, d, to);
    }
}

template <class T>
void attend(const Call<T> &call, Scratch<T> &own, const RowTile &tile, const Queries &queries) {
    begin_queries(call, own, tile, queries);
    for (int64_t begin = 0; begin < tile.context; begin += CHUNK) {
        const int64_t count = tile.context - begin < CHUNK ? tile.context - begin : CHUNK;
        find_tokens(call, own, tile, queries.kv_head, begin, count);
        pack_chunk(call, own, count);
        for (int64_t i = 0; i < tile.rows * queries.count; i += TILE) attend_tile(call, own, tile, queries, i, begin);
    }
    end_queries(call, own, tile, queries);
}

// Whether bfloat16 numbers are multiplied by AMX.
bool has_amx() {
    static const bool has = clif_level() == CLIF_AMX;
    return has;
}

template <class T>
void attend_share(const Call<T> &call, int thread, int threads) {
    const int64_t group = call.group(), heads = group < QUERIES ? group : QUERIES, most = QUERIES / heads;
    int64_t total = 0, before = 0;
    for_tiles(call.rows, most, [&](const RowTile &tile) { total += cost_of(tile, group) * call.heads.kv_heads; });
    Scratch<T> own;
    memset(own.nothing, 0, sizeof own.nothing);
    for_tiles(call.rows, most, [&](const RowTile &tile) {
        const int64_t cost = cost_of(tile, group);
        for (int64_t kv_head = 0; kv_head < call.heads.kv_heads; ++kv_head, before += cost) {
            // The thread in whose share of the total the middle of the item lies.
            if ((2 * before + cost) * threads / (2 * total) != thread) continue;
            for (int64_t head = 0; head < group; head += heads) {
                attend(call, own, tile, {kv_head, head, group - head < heads ? group - head : heads});
            }
        }
    });
}

}  // namespace

template <class T>
void attention(const clif_heads &heads, const T *query, int64_t query_stride, const T *cache, int64_t cache_slots,
               const clif_rows &rows, float scale, T *out, int thread, int threads) {
    const bool amx = sizeof(T) == sizeof(uint16_t) && has_amx();
    const float to_base_2 = scale * 1.44269504f;
    attend_share<T>({heads, query, query_stride, cache, cache_slots, rows, to_base_2, out, amx}, thread, threads);
    if (amx) _tile_release();
}

// For both types, for layers.cpp as well.
template void attention(const clif_heads &, const float *, int64_t, const float *, int64_t, const clif_rows &, float,
                        float *, int, int);
template void attention(const clif_heads &, const uint16_t *, int64_t, const uint16_t *, int64_t, const clif_rows &,
                        float, uint16_t *, int, int);

}  // namespace clif

CLIF_API void clif_attention(int type, const clif_heads *heads, const void *query, int64_t query_stride,
                             const void *cache, int64_t cache_slots, const clif_rows *rows, float scale, void *out,
                             int threads) {
    clif::of_type(type, [&](auto number) {
        using T = decltype(number);
        clif::on_threads(threads, [&](int thread, int count) {
            clif::attention<T>(*heads, static_cast<const T *>(query), query_stride, static_cast<const T *>(cache),
                               cache_slots, *rows, scale, static_cast<T *>(out), thread, count);
        });
    });
}
