// Packs a matrix for products: see clif_pack in clif_cpu.h.
#include "panels.h"

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
