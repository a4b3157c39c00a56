// Whole decoder layers of a serving step, in one parallel region: what clif/models/layer.py does, part by part.
//
// A step of few rows is over in a few milliseconds: a call of each part from Python would cost as much again. Each part
// gives a thread its share; a barrier lies between a part and what reads all of its result.
#include <algorithm>

#include "parts.h"

namespace clif {
namespace {

struct Widths {
    int64_t hidden, heads, qkv, inner, low;
    explicit Widths(const clif_layer &layer)
        : hidden(layer.qkv.in),
          heads(layer.heads.heads * layer.heads.head_dim),
          qkv(layer.qkv.out),
          inner(layer.down.in),
          low(padded(std::max({layer.qkv.rank, layer.out.rank, layer.gate_up.rank, layer.down.rank}))) {}

    int64_t row() const { return 2 * hidden + heads + qkv + 3 * inner + low; }
};

// What parts of a layer leave to the next: rows of each.
struct Scratch {
    uint16_t *normed, *added, *attended, *qkv, *wide, *gated, *low;
    Scratch(uint16_t *memory, const Widths &widths, int64_t rows) {
        normed = memory;
        added = normed + rows * widths.hidden;
        attended = added + rows * widths.hidden;
        qkv = attended + rows * widths.heads;
        wide = qkv + rows * widths.qkv;
        gated = wide + 2 * rows * widths.inner;
        low = gated + rows * widths.inner;
    }
};

// One thread of the team that computes a step.
class Member {
   public:
    Member(const clif_step &step, const Widths &widths, const Scratch &scratch, uint16_t *hidden, int level, int thread,
           int threads)
        : step_(step), widths_(widths), s_(scratch), hidden_(hidden), level_(level), thread_(thread), threads_(threads),
          rows_(step.rows.rows) {}

    void run(const clif_layer *layers, int64_t count) {
        const uint16_t *added = nullptr;
        for (int64_t i = 0; i < count; i++) {
            attend(layers[i], added);
            mlp(layers[i]);
            added = s_.added;
        }
        if (added != nullptr) add();
    }

   private:
    void attend(const clif_layer &layer, const uint16_t *added) {
        linear(layer.qkv, norm(added, layer.norm), s_.qkv);
        if (layer.q_all.weight) norm_heads(layer);
        rotate<uint16_t>(layer.heads, s_.qkv, layer.angles, step_.positions, layer.cache, step_.cache_slots, step_.slots,
                         rows_, thread_, threads_);
        wait();
        attention<uint16_t>(layer.heads, s_.qkv, widths_.qkv, layer.cache, step_.cache_slots, step_.rows, layer.scores,
                            s_.attended, thread_, threads_);
        wait();
        linear(layer.out, s_.attended, s_.added);
        finish(layer.post_norm, layer.residual_scale);
    }

    void mlp(const clif_layer &layer) {
        gate(layer, norm(s_.added, layer.mlp_norm));
        linear(layer.down, s_.gated, s_.added);
        finish(layer.post_mlp_norm, layer.residual_scale);
    }

    // The sum in hidden. Returns what it is normalised, or itself where there is no norm.
    const uint16_t *norm(const uint16_t *added, const clif_norm &norm) {
        if (norm.weight) {
            rms_norm<uint16_t>(hidden_, added, norm, hidden_, s_.normed, rows_, widths_.hidden, thread_, threads_);
        } else if (added) {
            add();
        }
        wait();
        return norm.weight ? s_.normed : hidden_;
    }

    void norm_heads(const clif_layer &layer) {
        const int64_t d = layer.heads.head_dim, queries = layer.heads.heads * d, keys = layer.heads.kv_heads * d;
        rms_norm_in_place(s_.qkv, widths_.qkv, layer.q_all, rows_, queries, thread_, threads_);
        rms_norm_in_place(s_.qkv + queries, widths_.qkv, layer.k_all, rows_, keys, thread_, threads_);
        wait();
    }

    // What attention or the MLP gives, as it is added. A thread has the same rows in what comes next: no barrier.
    void finish(const clif_norm &norm, float scale) {
        if (norm.weight) rms_norm_in_place(s_.added, widths_.hidden, norm, rows_, widths_.hidden, thread_, threads_);
        if (scale == 1.0f) return;
        const Range mine = share(rows_, thread_, threads_);
        for (int64_t i = mine.begin * widths_.hidden; i < mine.end * widths_.hidden; i++)
            s_.added[i] = narrow(widen(s_.added[i]) * scale);
    }

    void gate(const clif_layer &layer, const uint16_t *x) {
        const clif_linear &wide = layer.gate_up;
        if (!gates_meet(wide)) {
            linear(wide, x, s_.wide);
            gated<uint16_t>(layer.activation, s_.wide, s_.gated, rows_, widths_.inner, thread_, threads_);
        } else {
            linear_gated(wide, layer.activation, x, wide.in, low(wide, x), s_.low, s_.gated, widths_.inner, rows_, level_,
                         thread_, threads_);
        }
        wait();
    }

    // The low parts of all rows where the layer has adapters. Returns the rows' adapters, or null.
    const int32_t *low(const clif_linear &linear, const uint16_t *x) {
        if (linear.rank == 0 || step_.adapters == nullptr) return nullptr;
        linear_low(linear, x, linear.in, step_.adapters, s_.low, rows_, level_, thread_, threads_);
        wait();
        return step_.adapters;
    }

    void linear(const clif_linear &linear, const uint16_t *x, uint16_t *y) {
        const int32_t *adapters = low(linear, x);
        linear_rest(linear, x, linear.in, adapters, s_.low, y, linear.out, rows_, level_, thread_, threads_);
        wait();
    }

    void add() {
        const Range mine = share(rows_, thread_, threads_);
        for (int64_t i = mine.begin * widths_.hidden; i < mine.end * widths_.hidden; i++)
            hidden_[i] = narrow(widen(hidden_[i]) + widen(s_.added[i]));
    }

    // All threads have come this far.
    void wait() {
        if (threads_ > 1) {
#pragma omp barrier
        }
    }

    const clif_step &step_;
    const Widths &widths_;
    const Scratch &s_;
    uint16_t *hidden_;
    int level_, thread_, threads_;
    int64_t rows_;
};

}  // namespace
}  // namespace clif

CLIF_API int64_t clif_layers_scratch(const clif_layer *layer, int64_t rows) {
    return rows * clif::Widths(*layer).row();
}

CLIF_API void clif_layers(const clif_layer *layers, int64_t count, const clif_step *step, uint16_t *hidden,
                          uint16_t *scratch, int level, int threads) {
    const clif::Widths widths(*layers);
    const clif::Scratch parts(scratch, widths, step->rows.rows);
    clif::on_threads(threads, [&](int thread, int of) {
        clif::Member(*step, widths, parts, hidden, level, thread, of).run(layers, count);
    });
}
