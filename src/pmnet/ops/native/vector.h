// Sixteen floats at a time, and the elementary functions of the model on them.
//
// Every operation is written out (fused multiply-adds are explicit, the compiler may not contract others), partial
// vectors are zero-padded to the same sixteen lanes, and sums over lanes use one fixed tree. A result therefore
// depends on the numbers alone: not on how many positions are computed together, on the number of threads, or on the
// width of the machine's registers.
//
// `vf` is a register of floats, `v16` one, two or four of them: compilers keep a vector that is wider than a register
// in memory, and take it apart lane by lane.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef float anywhere __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));  // in memory
constexpr float PI = 3.14159265358979323846f;

// One register

#if defined(__AVX512F__)
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX__)
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr vi LANE = {0, 1, 2, 3};
#endif
static inline void spread(float x, vf* v) { *v = x - vf{}; }
static inline void read(const float* p, vf* v) { *v = *(const anywhere*)p; }
static inline void read(const float* p, vf* v, int64_t count) {  // lanes from `count` on are zero
    if (count >= WIDTH) return read(p, v);
    *v = vf{};
    if (count <= 0) return;
#if defined(__AVX512F__)
    *v = (vf)_mm512_maskz_loadu_ps((1u << count) - 1, p);
#elif defined(__AVX__)
    *v = (vf)_mm256_maskload_ps(p, (__m256i)(LANE < (int32_t)count));
#else
    memcpy(v, p, count * sizeof(float));
#endif
}
static inline void write(float* p, vf v) { *(anywhere*)p = v; }
static inline void write(float* p, vf v, int64_t count) {
    if (count >= WIDTH) return write(p, v);
    if (count <= 0) return;
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
#else
    memcpy(p, &v, count * sizeof(float));
#endif
}
static inline void widen(const int8_t* p, vf* v) {  // 8-bit integers as floats
#if defined(__AVX512F__)
    *v = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    *v = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    for (int i = 0; i < WIDTH; i++) (*v)[i] = p[i];
#endif
}
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < WIDTH; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
// the lesser and the greater of both, `a` where it is not a number
#if defined(__AVX512F__)
static inline vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)b, (__m512)a); }
static inline vf greater(vf a, vf b) { return (vf)_mm512_max_ps((__m512)b, (__m512)a); }
#elif defined(__AVX__)
static inline vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)b, (__m256)a); }
static inline vf greater(vf a, vf b) { return (vf)_mm256_max_ps((__m256)b, (__m256)a); }
#else
static inline vf smaller(vf a, vf b) { return b < a ? b : a; }
static inline vf greater(vf a, vf b) { return b > a ? b : a; }
#endif
static inline vf power_of_two(vf n) { return (vf)((__builtin_convertvector(n, vi) + 127) << 23); }
static inline vf sign_of(vf n) { return (vf)((__builtin_convertvector(n, vi) << 31) ^ (vi)(1.f - vf{})); }  // (-1)^n
static inline vf keep(vf v, int64_t count, float rest) {
    if (count >= WIDTH) return v;
    return LANE < (int32_t)(count > 0 ? count : 0) ? v : rest - vf{};
}
// lanes move down by STEP, a power of two; what stands in the last ones then is of no use
template <int STEP>
static inline vf down(vf v) {
    return __builtin_shuffle(v, (LANE + STEP) & (WIDTH - 1));
}
static inline float sum(vf v) {  // one fixed tree
#if defined(__AVX512F__)
    v += down<8>(v);
#endif
#if defined(__AVX__)
    v += down<4>(v);
#endif
    v += down<2>(v);
    return v[0] + v[1];
}
static inline float greatest(vf v) {
#if defined(__AVX512F__)
    v = greater(v, down<8>(v));
#endif
#if defined(__AVX__)
    v = greater(v, down<4>(v));
#endif
    v = greater(v, down<2>(v));
    return greater(v, down<1>(v))[0];
}

// Several registers

template <class H>
struct Twice {
    H low, high;
    Twice& operator+=(Twice b) { return *this = *this + b; }
    Twice& operator-=(Twice b) { return *this = *this - b; }
};
#define PAIRWISE(operation) \
    template <class H> \
    static inline Twice<H> operator operation(Twice<H> a, Twice<H> b) { return {a.low operation b.low, a.high operation b.high}; }
PAIRWISE(+) PAIRWISE(-) PAIRWISE(*) PAIRWISE(/)
#undef PAIRWISE
template <class H> static inline Twice<H> operator-(Twice<H> a) { return {-a.low, -a.high}; }
template <class H> static inline Twice<H> fma(Twice<H> a, Twice<H> b, Twice<H> c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
template <class H> static inline Twice<H> smaller(Twice<H> a, Twice<H> b) { return {smaller(a.low, b.low), smaller(a.high, b.high)}; }
template <class H> static inline Twice<H> greater(Twice<H> a, Twice<H> b) { return {greater(a.low, b.low), greater(a.high, b.high)}; }
template <class H> static inline Twice<H> power_of_two(Twice<H> n) { return {power_of_two(n.low), power_of_two(n.high)}; }
template <class H> static inline Twice<H> sign_of(Twice<H> n) { return {sign_of(n.low), sign_of(n.high)}; }
template <class H> constexpr int HALF = sizeof(H) / sizeof(float);
template <class H> static inline void spread(float x, Twice<H>* v) { spread(x, &v->low), spread(x, &v->high); }
template <class H> static inline void read(const float* p, Twice<H>* v) { read(p, &v->low), read(p + HALF<H>, &v->high); }
template <class H> static inline void read(const float* p, Twice<H>* v, int64_t count) { read(p, &v->low, count), read(p + HALF<H>, &v->high, count - HALF<H>); }
template <class H> static inline void write(float* p, Twice<H> v) { write(p, v.low), write(p + HALF<H>, v.high); }
template <class H> static inline void write(float* p, Twice<H> v, int64_t count) { write(p, v.low, count), write(p + HALF<H>, v.high, count - HALF<H>); }
template <class H> static inline void widen(const int8_t* p, Twice<H>* v) { widen(p, &v->low), widen(p + HALF<H>, &v->high); }
template <class H> static inline Twice<H> keep(Twice<H> v, int64_t count, float rest) { return {keep(v.low, count, rest), keep(v.high, count - HALF<H>, rest)}; }
template <class H> static inline float sum(Twice<H> v) { return sum(v.low + v.high); }
template <class H> static inline float greatest(Twice<H> v) { return greatest(greater(v.low, v.high)); }

#if defined(__AVX512F__)
typedef vf v16;
#elif defined(__AVX__)
typedef Twice<vf> v16;
#else
typedef Twice<Twice<vf>> v16;
#endif

// Sixteen lanes

static inline v16 splat(float x) {
    v16 v;
    spread(x, &v);
    return v;
}
static inline v16 load(const float* p) {
    v16 v;
    read(p, &v);
    return v;
}
static inline v16 load(const float* p, int64_t count) {  // lanes from `count` on are zero
    if (count >= LANES) return load(p);
    v16 v;
    read(p, &v, count);
    return v;
}
static inline v16 widen(const int8_t* p) {
    v16 v;
    widen(p, &v);
    return v;
}
static inline void store(float* p, v16 v) { write(p, v); }
static inline void store(float* p, v16 v, int64_t count) {  // the first `count` lanes
    if (count >= LANES) return write(p, v);
    write(p, v, count);
}
// to the nearest integer, ties to even, for |a| < 2^22
static inline v16 round_even(v16 a) { return (a + splat(12582912.f)) - splat(12582912.f); }

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
    *power = power_of_two(n);
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
