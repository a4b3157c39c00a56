// Vectors of 16 numbers, which are float32 in registers and float32 or bfloat16 in memory.
//
// What follows this include is compiled for AVX512: it may run at level CLIF_AVX512 and above alone.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")

namespace clif {

constexpr int64_t LANES = 16;

// The lanes that n numbers take, all of them from 16 numbers on.
inline __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

// Memory outside the mask is not read, and its lanes are zero.
inline __m512 load(const float *from, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load(const uint16_t *from, __mmask16 mask = 0xffff) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Rounded to the nearest, ties to even; subnormal bfloat16 numbers become zero.
inline void store(float *to, __m512 x, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store(uint16_t *to, __m512 x, __mmask16 mask = 0xffff) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store_two(float *to, __m512 first, __m512 second) {
    _mm512_storeu_ps(to, first);
    _mm512_storeu_ps(to + LANES, second);
}
inline void store_two(uint16_t *to, __m512 first, __m512 second) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// x as a number of type T would hold it.
template <class T>
inline __m512 rounded(__m512 x);
template <>
inline __m512 rounded<float>(__m512 x) {
    return x;
}
template <>
inline __m512 rounded<uint16_t>(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

inline __m512 splat(float x) { return _mm512_set1_ps(x); }

// e^x to 2 units in the last place, infinities and NaN included. Source: expf of the Cephes library (Moshier).
inline __m512 exp(__m512 x) {
    // Beyond these the result is infinite or zero. A NaN passes: the second argument is taken for it.
    x = _mm512_max_ps(splat(-104.0f), _mm512_min_ps(splat(89.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, splat(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, splat(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, splat(-2.12194440e-4f), r);
    __m512 p = splat(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, splat(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, splat(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, splat(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, splat(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, splat(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, splat(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// 2^x for x from -126 to 128, below which it is 2^-126. To 2 units in the last place for float32, and for what is rounded
// to bfloat16 afterwards to 3e-6. 2^0 is 1.
template <class T>
inline __m512 exp2(__m512 x) {
    // A NaN passes: the second argument is taken for it.
    x = _mm512_max_ps(splat(-126.0f), x);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT), r = _mm512_sub_ps(x, n);
    __m512 p;
    if constexpr (sizeof(T) == sizeof(uint16_t)) {
        p = _mm512_fmadd_ps(splat(0.00958285294f), r, splat(0.0559064262f));
        p = _mm512_fmadd_ps(p, r, splat(0.240240991f));
        p = _mm512_fmadd_ps(p, r, splat(0.693124175f));
    } else {
        p = _mm512_fmadd_ps(splat(0.00015353362f), r, splat(0.0013398875f));
        p = _mm512_fmadd_ps(p, r, splat(0.00961843692f));
        p = _mm512_fmadd_ps(p, r, splat(0.0555033237f));
        p = _mm512_fmadd_ps(p, r, splat(0.240226477f));
        p = _mm512_fmadd_ps(p, r, splat(0.693147182f));
    }
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, splat(1.0f)), n);
}

// To 2 units in the last place. Source: tanhf of the Cephes library (Moshier).
inline __m512 tanh(__m512 x) {
    const __m512 square = _mm512_mul_ps(x, x), size = _mm512_abs_ps(x);
    __m512 p = splat(-5.70498872745e-3f);
    p = _mm512_fmadd_ps(p, square, splat(2.06390887954e-2f));
    p = _mm512_fmadd_ps(p, square, splat(-5.37397155531e-2f));
    p = _mm512_fmadd_ps(p, square, splat(1.33314422036e-1f));
    p = _mm512_fmadd_ps(p, square, splat(-3.33332819422e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, square), x, x);
    const __mmask16 large = _mm512_cmp_ps_mask(size, splat(0.625f), _CMP_GT_OQ);
    if (!large) return p;
    const __m512 below = _mm512_div_ps(splat(2.0f), _mm512_add_ps(exp(_mm512_add_ps(size, size)), splat(1.0f)));
    const __m512 far = _mm512_sub_ps(splat(1.0f), below);
    const __m512 sign = _mm512_and_ps(x, splat(-0.0f));
    return _mm512_mask_mov_ps(p, large, _mm512_or_ps(far, sign));
}

// x / (1 + e^-x).
inline __m512 silu(__m512 x) {
    const __m512 below = _mm512_sub_ps(_mm512_setzero_ps(), x);
    return _mm512_div_ps(x, _mm512_add_ps(splat(1.0f), exp(below)));
}

constexpr float GELU_RATE = 1.59576912f, GELU_CUBE = 0.044715f;  // 2 sqrt(2 / pi), and what x^3 counts

// x (1 + tanh(y)) / 2 = x / (1 + e^-2y) with y = sqrt(2 / pi) (x + 0.044715 x^3).
inline __m512 gelu(__m512 x) {
    const __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    const __m512 below = _mm512_mul_ps(_mm512_fmadd_ps(cubed, splat(GELU_CUBE), x), splat(-GELU_RATE));
    return _mm512_div_ps(x, _mm512_add_ps(splat(1.0f), exp(below)));
}

// What multiplies the other half. ACTIVATION: as in clif_cpu.h.
template <int ACTIVATION>
inline __m512 activated(__m512 x) {
    return ACTIVATION == 0 ? silu(x) : gelu(x);
}

}  // namespace clif
