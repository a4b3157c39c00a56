// Parts of quantised matrices as plain rows, for what multiplies with them the other way round.
#include "panels.h"
#include "widen.h"

namespace clif {
namespace {

// A tile as rows of its outputs, `width` numbers apart, each number rounded once.
void rows_of(const clif_linear &linear, int64_t panel, int64_t tile, uint16_t *dense, int64_t width) {
    alignas(64) uint16_t room[TILE];
    const int64_t tiles = padded(linear.in) / DEPTH;
    const uint8_t *numbers = static_cast<const uint8_t *>(linear.weight) + (panel * tiles + tile) * TILE * linear.bits / 8;
    const Groups groups = groups_of(linear).of_panel(panel, tiles);
    const int form = form_of(linear);
    if (form == 8) widen8(numbers, room);
    if (form == GROUPED) widen8(numbers, groups, tile, room);
    if (form == 4) widen4(numbers, groups, tile, room);
    __m512i rows[PANEL];
    for (int64_t pair = 0; pair < DEPTH / 2; pair++) rows[pair] = _mm512_load_si512(room + pair * 2 * PANEL);
    training::transpose16(rows);
    alignas(64) float scales[PANEL];
    if (form == 8) _mm512_store_ps(scales, groups.scale(groups.first));
    for (int64_t out = 0; out < PANEL; out++) {
        const __m512i row = rows[out];
        _mm512_storeu_si512(dense + out * width, form == 8 ? training::scaled(row, scales[out]) : row);
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
