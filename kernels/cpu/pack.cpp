// Packs a matrix for products: see clif_pack in clif_cpu.h.
#include "panels.h"

namespace {

// 32 numbers times scale, rounded once.
__m512i scaled(__m512i numbers, float scale) {
    alignas(64) uint16_t from[32];
    _mm512_store_si512(from, numbers);
    const __m512 low = _mm512_mul_ps(clif::load(from), clif::splat(scale));
    const __m512 high = _mm512_mul_ps(clif::load(from + 16), clif::splat(scale));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

}  // namespace

CLIF_API void clif_pack(const uint16_t *matrix, int64_t out, int64_t in, int64_t row_stride, float scale,
                        uint16_t *packed) {
    using namespace clif::training;
    const int64_t deep = clif::padded(in);
    for (int64_t o = 0; o < clif::padded(out); o += 16)
        for (int64_t i = 0; i < deep; i += 32, packed += 512) {
            __m512i r[16];
            for (int j = 0; j < 16; j++) {
                const uint16_t *from = matrix + (o + j) * row_stride + i;
                r[j] = o + j < out ? _mm512_maskz_loadu_epi16(lanes32(in - i), from) : _mm512_setzero_si512();
                if (scale != 1.0f) r[j] = scaled(r[j], scale);
            }
            transpose16(r);
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(packed + j * 32, r[j]);
        }
}
