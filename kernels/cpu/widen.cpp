// Parts of quantised matrices as plain rows, for what multiplies with them the other way round.
#include "panels.h"
#include "widen.h"

namespace clif {
namespace {

// A tile as rows of its outputs, `width` numbers apart, each number rounded once.
void rows_of(const clif_linear &linear, int64_t panel, int64_t tile, uint16_t *dense, int64_t width) {
    alignas(64) uint16_t room[TILE];
    const int64_t at = panel * (padded(linear.in) / DEPTH) + tile;
    const uint8_t *numbers = static_cast<const uint8_t *>(linear.weight) + at * TILE * linear.bits / 8;
    if (linear.bits == 8)
        widen8(numbers, room);
    else
        widen4(numbers, linear.scales + at * PANEL, linear.least ? linear.least + at * PANEL : nullptr, room);
    __m512i rows[PANEL];
    for (int64_t pair = 0; pair < DEPTH / 2; pair++) rows[pair] = _mm512_load_si512(room + pair * 2 * PANEL);
    training::transpose16(rows);
    for (int64_t out = 0; out < PANEL; out++) {
        const __m512i row = rows[out];
        const float scale = linear.bits == 8 ? widen(linear.scales[panel * PANEL + out]) : 1.0f;
        _mm512_storeu_si512(dense + out * width, linear.bits == 8 ? training::scaled(row, scale) : row);
    }
}

}  // namespace
}  // namespace clif

CLIF_API void clif_widen(const clif_linear *linear, int64_t first, int64_t tiles, uint16_t *dense, int threads) {
    using namespace clif;
    const int64_t width = tiles * DEPTH;
    on_threads(threads, [&](int thread, int of) {
        const Range mine = share(padded(linear->out) / PANEL, thread, of);
        for (int64_t panel = mine.begin; panel < mine.end; panel++)
            for (int64_t tile = 0; tile < tiles; tile++)
                rows_of(*linear, panel, first + tile, dense + panel * PANEL * width + tile * DEPTH, width);
    });
}
