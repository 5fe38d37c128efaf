// Sixteen floats at a time, and the elementary functions of the model on them.
//
// Every operation is written out (fused multiply-adds are explicit, the compiler may not contract others), partial
// vectors are zero-padded to the same sixteen lanes, and sums over lanes use one fixed tree. A result therefore
// depends on the numbers alone: not on how many positions are computed together, on the number of threads, or on the
// width of the machine's registers.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
constexpr int LANES = 16;
constexpr float PI = 3.14159265358979323846f;

static inline v16 splat(float x) { return x - v16{}; }
static inline v16 load(const float* p) {
    v16 v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline v16 load(const float* p, int64_t count) {  // lanes from `count` on are zero
    if (count >= LANES) return load(p);
#if defined(__AVX512F__)
    return (v16)_mm512_maskz_loadu_ps((1u << count) - 1, p);
#else
    v16 v{};
    memcpy(&v, p, count * sizeof(float));
    return v;
#endif
}
static inline v16 widen(const int8_t* p) {  // sixteen 8-bit integers as floats
#if defined(__AVX512F__)
    return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    v16 v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
static inline void store(float* p, v16 v) { memcpy(p, &v, sizeof v); }
static inline void store(float* p, v16 v, int64_t count) {  // the first `count` lanes
    if (count >= LANES) return store(p, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
#else
    memcpy(p, &v, count * sizeof(float));
#endif
}

static inline v16 fma(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
// to the nearest integer, ties to even, for |a| < 2^22
static inline v16 round_even(v16 a) { return (a + splat(12582912.f)) - splat(12582912.f); }
// the lesser and the greater of both, `a` where it is not a number
#if defined(__AVX512F__)
static inline v16 smaller(v16 a, v16 b) { return (v16)_mm512_min_ps((__m512)b, (__m512)a); }
static inline v16 greater(v16 a, v16 b) { return (v16)_mm512_max_ps((__m512)b, (__m512)a); }
#else
static inline v16 smaller(v16 a, v16 b) { return b < a ? b : a; }
static inline v16 greater(v16 a, v16 b) { return b > a ? b : a; }
#endif

// lanes move down by WIDTH, which is 8, 4, 2 or 1; what stands in the last ones then is of no use
template <int WIDTH>
static inline v16 down(v16 v) {
    i16 from = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(v, (from + WIDTH) & 15);
}
static inline float sum(v16 v) {  // one fixed tree
    v += down<8>(v);
    v += down<4>(v);
    v += down<2>(v);
    return v[0] + v[1];
}
static inline float greatest(v16 v) {
    v = greater(v, down<8>(v));
    v = greater(v, down<4>(v));
    v = greater(v, down<2>(v));
    return greater(v, down<1>(v))[0];
}

// exp(x) - 1 = power * result + (power - 1) for |x| <= 87, by x = n ln 2 + r and the Taylor series of r (|r| <= 0.35)
static inline v16 expm1(v16 x, v16* power) {
    v16 n = round_even(x * splat(1.44269504088896341f));
    v16 r = fma(n, splat(-0.693145751953125f), x);
    r = fma(n, splat(-1.42860682030941723e-6f), r);
    v16 p = splat(1.f / 5040);
    p = fma(p, r, splat(1.f / 720));
    p = fma(p, r, splat(1.f / 120));
    p = fma(p, r, splat(1.f / 24));
    p = fma(p, r, splat(1.f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p * r, r, r);
    *power = (v16)((__builtin_convertvector(n, i16) + 127) << 23);
    return p;
}
static inline v16 exp(v16 x) {
    v16 power, p = expm1(smaller(greater(x, splat(-87.f)), splat(87.f)), &power);
    return fma(power, p, power);
}
// (e^2x - 1) / (e^2x + 1), accurate relative to x for small x
static inline v16 tanh(v16 x) {
    v16 power, y = smaller(greater(x, splat(-10.f)), splat(10.f));
    v16 p = expm1(y + y, &power);
    v16 e = fma(power, p, power - splat(1.f));
    return e / (e + splat(2.f));
}
static inline v16 logistic(v16 x) { return splat(1.f) / (splat(1.f) + exp(-x)); }

// Taylor series for |r| <= pi / 2; `odd` is +-1 by the half turns taken off
static inline v16 sine_of(v16 r, v16 s, v16 odd) {
    v16 p = splat(1.f / 6227020800.f);
    p = fma(p, s, splat(-1.f / 39916800));
    p = fma(p, s, splat(1.f / 362880));
    p = fma(p, s, splat(-1.f / 5040));
    p = fma(p, s, splat(1.f / 120));
    p = fma(p, s, splat(-1.f / 6));
    return odd * fma(p * s, r, r);
}
static inline v16 cosine_of(v16 s, v16 odd) {
    v16 p = splat(1.f / 479001600);
    p = fma(p, s, splat(-1.f / 3628800));
    p = fma(p, s, splat(1.f / 40320));
    p = fma(p, s, splat(-1.f / 720));
    p = fma(p, s, splat(1.f / 24));
    p = fma(p, s, splat(-0.5f));
    return odd * fma(p, s, splat(1.f));
}
static inline v16 sign_of(v16 n) { return (v16)((__builtin_convertvector(n, i16) << 31) ^ (i16)splat(1.f)); }

// sine and cosine of an angle in radians, |x| below a few thousand
static inline void sine_cosine(v16 x, v16* sine, v16* cosine) {
    v16 n = round_even(x * splat(0.318309886183790672f));
    v16 r = fma(n, splat(-3.1415927410125732f), x);  // pi as float, then what is left of it
    r = fma(n, splat(8.74227765734758577e-8f), r);
    v16 s = r * r, odd = sign_of(n);
    *sine = sine_of(r, s, odd);
    *cosine = cosine_of(s, odd);
}
// the same of pi * d, |d| <= 2
static inline v16 cosine_pi(v16 d) {
    v16 n = round_even(d), r = (d - n) * splat(PI);
    return cosine_of(r * r, sign_of(n));
}
static inline v16 sine_pi(v16 d) {
    v16 n = round_even(d), r = (d - n) * splat(PI);
    return sine_of(r, r * r, sign_of(n));
}
