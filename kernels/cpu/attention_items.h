// What attention computes one after the other: KV heads of tiles of rows, and chunks of the tokens that they see.
#pragma once
#include <math.h>
#include <string.h>

#include "attention_few.h"
#include "attention_tiles.h"
#include "parts.h"

namespace clif {
namespace {

// Tokens whose keys and values lie in a cache of the first or second level; queries of one item.
constexpr int64_t CHUNK = 128, QUERIES = 192;
// Tokens whose products a sum takes together, whatever multiplies.
constexpr int64_t PER_SUM = 32;

// Rows of one sequence, the longest of their contexts, and the first token that one of them sees.
struct RowTile {
    int64_t row, rows, context, first;

    // Where chunks begin: whole 32 tokens, which products sum together.
    int64_t begin() const { return first / PER_SUM * PER_SUM; }
};

// A KV head of a tile, and `count` heads of its group, from `head` on. Its queries are these heads of each row, row by
// row.
struct Item {
    RowTile tile;
    int64_t kv_head, head, count;

    int64_t queries() const { return tile.rows * count; }
};

// Where keys and values of the item's tokens from `begin` on lie, `count` of them; the first `unseen` lie nowhere.
template <class T>
struct Tokens {
    int64_t begin, count, unseen;
    const T *key[CHUNK], *value[CHUNK];
};

// Memory of one thread, on its stack.
template <class T>
struct alignas(64) Scratch {
    T keys[CHUNK * MAX_HEAD_DIM], values[CHUNK * MAX_HEAD_DIM], queries[QUERIES * MAX_HEAD_DIM];
    float sums[QUERIES * MAX_HEAD_DIM], scores[2][TILE * CHUNK], by_token[CHUNK * TILE];
    T weights[TILE * CHUNK], nothing[MAX_HEAD_DIM];
    __m512 total[QUERIES];
    float largest[QUERIES];
    int64_t first[QUERIES], context[QUERIES];  // of the tokens that each query sees, and the end
    Tokens<T> tokens[2];
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
    const clif_scores &scores;
    T *out;
    bool amx;
    float scale;  // of what the softmax reads, to base 2

    int64_t head_dim() const { return heads.head_dim; }
    int64_t group() const { return heads.heads / heads.kv_heads; }
    // Numbers of a head, padded.
    int64_t inner() const { return round_up(heads.head_dim, PER_ROW<T>); }
    int64_t first_seen(int64_t context) const {
        return scores.window > 0 && context > scores.window ? context - scores.window : 0;
    }
};

// Where `work` is called with each tile of at most `most` rows, in order. A sequence's rows are cut evenly.
template <class T, class Work>
void for_tiles(const Call<T> &call, int64_t most, Work work) {
    const clif_rows &rows = call.rows;
    int64_t begin = 0;
    while (begin < rows.rows) {
        int64_t end = begin + 1;
        while (end < rows.rows && rows.sequence[end] == rows.sequence[begin]) ++end;
        const int64_t n = end - begin, pieces = (n + most - 1) / most;
        for (int64_t i = 0; i < pieces; ++i) {
            RowTile tile = {begin + n * i / pieces, 0, 0, INT64_MAX};
            tile.rows = begin + n * (i + 1) / pieces - tile.row;
            for (int64_t j = 0; j < tile.rows; ++j) {
                const int64_t context = rows.context[tile.row + j], first = call.first_seen(context);
                if (context > tile.context) tile.context = context;
                if (first < tile.first) tile.first = first;
            }
            work(tile);
        }
        begin = end;
    }
}

// What an item costs, in units of one query's attention to one token: laying one out costs several.
int64_t cost_of(const RowTile &tile, int64_t group) {
    return (tile.context - tile.first) * (8 + tile.rows * group) + 64;
}

// Where the chunk behind the one that begins here begins. The ends of chunks are the same for all rows of a sequence.
inline int64_t next_chunk(int64_t begin) { return (begin / CHUNK + 1) * CHUNK; }

// Find the next chunk of an item's tokens, from `begin` on. Blocks whose tokens no row of the tile sees may be another
// sequence's by now: `nothing` stands for them.
template <class T>
void find_tokens(const Call<T> &call, const Item &item, int64_t begin, const T *nothing, Tokens<T> &found) {
    const int64_t d = call.head_dim(), size = call.rows.block_size, left = item.tile.context - begin;
    const int64_t room = next_chunk(begin) - begin;
    const int32_t *blocks = call.rows.blocks + call.rows.sequence[item.tile.row] * call.rows.max_blocks;
    const T *keys = call.cache + item.kv_head * call.cache_slots * d;
    const T *values = keys + call.heads.kv_heads * call.cache_slots * d;
    found.begin = begin;
    found.count = left < room ? left : room;
    found.unseen = item.tile.first > begin ? item.tile.first - begin : 0;
    for (int64_t i = 0; i < found.unseen; ++i) found.key[i] = found.value[i] = nothing;
    const int64_t first = begin + found.unseen;
    int64_t offset = first % size;
    for (int64_t i = found.unseen, block = first / size; i < found.count; ++block, offset = 0) {
        const int64_t n = size - offset < found.count - i ? size - offset : found.count - i;
        int64_t at = (blocks[block] * size + offset) * d;
        for (const int64_t end = i + n; i < end; ++i, at += d) {
            found.key[i] = keys + at;
            found.value[i] = values + at;
        }
    }
}

template <class T>
void prefetch(const T *head, int64_t head_dim) {
    const char *line = reinterpret_cast<const char *>(head);
    for (int64_t i = 0; i < head_dim * static_cast<int64_t>(sizeof(T)); i += 64) _mm_prefetch(line + i, _MM_HINT_T1);
}

// Lay a chunk of keys and values out, with zeros behind the last one, and ask for the next one meanwhile.
template <class T>
void pack_chunk(const Call<T> &call, Scratch<T> &own, Tokens<T> &now, const Tokens<T> &next) {
    const int64_t d = call.head_dim(), dwords = call.inner() / PER_DWORD<T>, tiles = value_tiles<T>(d);
    const int64_t padded = round_up(now.count, PER_ROW<T>);
    uint32_t *keys = reinterpret_cast<uint32_t *>(own.keys), *values = reinterpret_cast<uint32_t *>(own.values);
    for (int64_t i = now.count; i < padded; ++i) now.key[i] = now.value[i] = own.nothing;
    for (int64_t i = 0; i < padded; i += TILE) {
        for (int64_t j = i; j < i + TILE && j < next.count; ++j) prefetch(next.key[j], d);
        pack_keys(now.key + i, d, dwords, keys + i * dwords);
    }
    for (int64_t i = 0; i < padded; i += PER_DWORD<T>) {
        for (int64_t j = i; j < i + PER_DWORD<T> && j < next.count; ++j) prefetch(next.value[j], d);
        pack_values(now.value + i, d, values + i / PER_DWORD<T> * tiles * TILE);
    }
}

}  // namespace
}  // namespace clif
